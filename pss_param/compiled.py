# SPDX-License-Identifier: Apache-2.0
r"""Whether compiled programs read the weights of a guard, and what of a guard must not become part of one.

# Note [How a compiled read is noticed]
A compiled training function leaves no trace in the model that it calls. But it is traced, and while it is traced every
read of a weight runs through its view. There :func:`note_traced` is called, which the compiler has been told to run at
once and to take for a constant: the compiled program contains nothing of it. A read always comes before the first
trigger, since a gradient does.

The program may be specialised to what the view passes. So that is the class of the guarded model and nothing finer:
equal layers, and the models of a sweep, go on sharing one graph. Of two models of one class in one process, one
compiled and one not, both count as compiled.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

__all__ = ["eagerly", "is_compiled", "listen", "note_traced", "tag_of", "was_traced"]

_F = TypeVar("_F", bound=Callable[..., object])

_traced: set[str] = set()


def tag_of(model: nn.Module) -> str:
    r"""Make the tag that the views of a model pass.

    Args:
        model: The guarded model.

    Returns:
        Its class, in words.

    Example:
        >>> tag_of(nn.Linear(2, 2))
        'torch.nn.modules.linear.Linear'
    """
    return f"{type(model).__module__}.{type(model).__qualname__}"


def note_traced(tag: str) -> bool:
    r"""Note that a compiled program reads guarded weights; runs when the program is traced, not when it runs.

    Args:
        tag: The tag of the guarded model.

    Returns:
        True, a constant.
    """
    _traced.add(tag)
    return True


def was_traced(tag: str) -> bool:
    r"""Tell whether a compiled program has read weights of a guarded model of this class.

    Args:
        tag: The tag of the guarded model.

    Returns:
        Whether :func:`note_traced` was called with it.

    Example:
        >>> was_traced("a class"), note_traced("a class"), was_traced("a class")
        (False, True, True)
    """
    return tag in _traced


def is_compiled(model: nn.Module) -> bool:
    r"""Tell whether a module in a model was compiled in place, be it before its first call.

    Args:
        model: The model whose weights are read.

    Returns:
        Whether ``module.compile()`` was called anywhere in it.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> layer.compile()
        >>> is_compiled(layer)
        True
    """
    return any(module._compiled_call_impl is not None for module in model.modules())


def listen() -> None:
    r"""Tell the compiler to run :func:`note_traced` while it traces.

    Not done at import, because it loads the compiler; whoever trains has it loaded by the optimizer.
    """
    torch.compiler.assume_constant_result(note_traced)  # type: ignore[no-untyped-call]


def eagerly(hook: _F) -> _F:
    r"""Keep a hook out of compiled programs: they stop where it is called, and go on after it.

    Traced, a hook that counts or compares Python numbers would be compiled anew whenever one of them changes. This too
    loads the compiler.

    Args:
        hook: The hook.

    Returns:
        The same for the caller.

    Example:
        >>> eagerly(len)([1, 2])
        2
    """
    kept: _F = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return kept
