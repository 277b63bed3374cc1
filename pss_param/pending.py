# SPDX-License-Identifier: Apache-2.0
r"""Who has read an open gate and still owes a backward pass; see Note [When a gate may move] of view.py."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["PendingReads"]


class PendingReads:
    r"""Reads of an open gate whose backward pass has not come; true while there are any.

    Example:
        >>> import torch
        >>> pending, weight = PendingReads(), torch.ones(2, requires_grad=True)
        >>> shown = weight * 1
        >>> pending.watch(shown)
        >>> loss = shown.sum()
        >>> bool(pending), loss.backward(), bool(pending)
        (True, None, False)
    """

    def __init__(self) -> None:
        self._tokens: weakref.WeakSet[_Token] = weakref.WeakSet()

    def watch(self, shown: Tensor) -> None:
        r"""Leave a token in a tensor's graph.

        Args:
            shown: What was read; it requires a gradient.
        """
        token = _Token(self._tokens)
        self._tokens.add(token)
        shown.register_hook(token.done)  # type: ignore[no-untyped-call]

    def __bool__(self) -> bool:
        return len(self._tokens) > 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "PendingReads":
        return PendingReads()

    def __reduce__(self) -> tuple[Callable[[], "PendingReads"], tuple[()]]:
        return PendingReads, ()


class _Token:
    """Owned by the autograd graph alone, so that a dropped graph takes it along."""

    def __init__(self, tokens: "weakref.WeakSet[_Token]") -> None:
        self._tokens = tokens

    def done(self, gradient: Tensor) -> None:
        self._tokens.discard(self)
