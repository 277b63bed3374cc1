# SPDX-License-Identifier: Apache-2.0
r"""The directions of all weights that were opened at once, found together.

# Note [Found together]
On a GPU a decomposition is hundreds of small kernels, and takes as long for one matrix as for twenty: 16 ms for a
768 x 768 on an H100, where a training step of a GPT-2 with 48 such weights takes 44. So the first read of one of
several gates that were opened at once finds the directions of all of them, small matrices of whatever shapes in one
batch (:func:`pss_param.smoothing.corrections`). The views keep what concerns them; the weights are the ones that this
read sees, since nothing changes a weight between the optimizer's step and the end of the backward pass that follows.

What a matrix was batched with may change the last bits of its directions. So whoever wants those bits, a read, a
checkpoint or a fold, gets them from here, and the same as long as the weight has the same norm.

A CPU, which is busy with one matrix, gains nothing; weights of which a rank holds pieces are found one by one, because
they are whole only inside their own forward pass.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from pss_param.errors import NonFiniteError
from pss_param.factors import Factors, factors_together
from pss_param.smoothing import WHOLE_MATRIX_SHAPES, Smoothing

if TYPE_CHECKING:
    from pss_param.view import SmoothingView

__all__ = ["Together", "may_join"]

_MOST_ELEMENTS = 1 << 27
"""Of matrices that are copied into one batch: half a gigabyte in float32."""


class _Part(NamedTuple):
    """One matrix of one weight."""

    view: SmoothingView
    number: int
    values: Tensor
    level: Tensor | None


def may_join(weight: Tensor, smoothing: Smoothing) -> bool:
    r"""Whether the directions of a weight are to be found together with those of others.

    Args:
        weight: The stored weight, a plain tensor.
        smoothing: Its smoothing; a callable edge is to see one weight at a time.

    Returns:
        The answer of Note [Found together].
    """
    return weight.is_cuda and smoothing.shape not in WHOLE_MATRIX_SHAPES and not callable(smoothing.edge)


class Together:
    r"""Weights that were opened at once. Their views hold this, so it holds them and their modules only weakly.

    Args:
        views: The views, and of each the module and the name of the stored weight.
    """

    def __init__(self, views: Mapping[SmoothingView, tuple[nn.Module, str]]) -> None:
        self._places = [(ref(view), ref(module), name) for view, (module, name) in views.items()]
        self._found: dict[str, tuple[float, tuple[Factors, ...] | None]] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        """Nothing: a copy of a layer must not drag the others along; its view finds its directions by itself."""

    def factors_of(self, view: SmoothingView, weight: Tensor) -> tuple[Factors, ...] | None:
        r"""The directions of one weight, found anew with those of all that are still wanted if it has changed.

        Args:
            view: One of the views.
            weight: Its stored weight.

        Returns:
            Its factors; ``None`` where it is to find them by itself: a weight of the batch is not finite, or there is
            no memory for all at once.
        """
        # Not by the version of the tensor, which fused optimizers and .data leave as it is.
        norm = _norms({view.label: weight})[view.label]
        before, factors = self._found.get(view.label, (math.nan, None))
        if before == norm:
            return factors
        present = self._wanted()
        norms = _norms({member.label: one for member, one in present.items()})
        try:
            found = _find(present)
        except (NonFiniteError, torch.OutOfMemoryError):  # a view by itself says which weight it is, or needs less
            found = {}
        self._found = {label: (size, found.get(label)) for label, size in norms.items()}
        return found.get(view.label)

    def _wanted(self) -> dict[SmoothingView, Tensor]:
        places = [(view(), module(), name) for view, module, name in self._places]
        weights = {
            view: module._parameters.get(name)
            for view, module, name in places
            if view is not None and module is not None and view.is_open and view.factors is None
        }
        return {view: weight for view, weight in weights.items() if weight is not None}


def _norms(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """One host synchronisation for all of a kind; wide, since in bfloat16 most steps would not change them."""
    groups: dict[object, dict[str, Tensor]] = {}
    for label, weight in weights.items():
        # Alone or among others the same bits: so what is no dense block, which has another kernel, is always alone.
        apart = "" if weight.is_contiguous() else label
        groups.setdefault((weight.device, weight.dtype, apart), {})[label] = weight.detach()
    found: dict[str, float] = {}
    for group in groups.values():
        wide = torch.promote_types(next(iter(group.values())).dtype, torch.float32)
        sizes = torch.stack(torch._foreach_norm([*group.values()], 2, wide))
        found.update(zip(group, sizes.tolist(), strict=True))
    return found


def _find(weights: Mapping[SmoothingView, Tensor]) -> dict[str, tuple[Factors, ...]]:
    parts = [part for view, weight in weights.items() for part in _parts_of(view, weight.detach())]
    found: dict[tuple[str, int], Factors] = {}
    for batch in _batches(parts):
        first = batch[0]
        levels = [part.level for part in batch if part.level is not None]
        pairs = factors_together(
            [part.values for part in batch], first.view.smoothing, first.view.generator(first.values.device), levels
        )
        found.update({(part.view.label, part.number): pair for part, pair in zip(batch, pairs, strict=True)})
    counts = Counter(part.view.label for part in parts)
    return {label: tuple(found[label, number] for number in range(count)) for label, count in counts.items()}


def _parts_of(view: SmoothingView, weight: Tensor) -> list[_Part]:
    values = view.matricization.split(weight)
    levels = view.levels if view.smoothing.edge == "baseline" and view.levels else (None,) * len(values)
    return [_Part(view, i, part, level) for i, (part, level) in enumerate(zip(values, levels, strict=True))]


def _batches(parts: list[_Part]) -> list[list[_Part]]:
    groups: dict[object, list[_Part]] = {}
    for part in parts:
        rule = part.view.smoothing
        if part.level is not None:  # it says all that the rule's own numbers would
            rule = replace(rule, init_std=None, reference=None)
        key = part.values.dtype, part.values.device, part.level is None, rule
        groups.setdefault(key, []).append(part)
    batches: list[list[_Part]] = []
    for group in groups.values():
        room = 0
        for part in group:
            if part.values.numel() > room:
                batches.append([])
                room = _MOST_ELEMENTS
            batches[-1].append(part)
            room -= part.values.numel()
    return batches
