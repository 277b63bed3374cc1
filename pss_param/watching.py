# SPDX-License-Identifier: Apache-2.0
r"""Guarding without a line in the loop: a hook on the optimizer's step, and what must not happen inside one.

# Note [What a hook on the optimizer sees]
The hook runs at the last moment before the update, so it sees what the loop made of the gradient: after clipping, and
with an optimizer that undoes a gradient scaler's factor itself (the fused ones) before that. The factor is read from
``optimizer.grad_scale``, where the scaler leaves it. Clipping cannot be undone, only noticed: the norm then reaches
one and the same ceiling again and again. A loop that clips should call ``guard.step(grad_norm=...)`` itself.
"""

import logging
import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pss_param.compiled import eagerly
from pss_param.errors import StateError
from pss_param.gradients import gradient_norm

if TYPE_CHECKING:
    from pss_param.guard import Guard

__all__ = ["Watch", "refuse_line_search"]

_log = logging.getLogger("pss_param")
_LBFGS_GLOBALS = vars(sys.modules[torch.optim.LBFGS.__module__])


class Watch:
    r"""Steps a guard just before every step of an optimizer; made by :meth:`pss_param.Guard.watch`.

    Attributes:
        optimizer: The watched optimizer; None once removed.

    Example:
        >>> import pss_param as pss
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> guard = pss.attach(model, targets="all")
        >>> handle = guard.watch(optimizer)
        >>> model(torch.ones(2, 8)).sum().backward()
        >>> optimizer.step()
        >>> guard.steps
        1
        >>> handle.remove()
    """

    repeats = 5
    """How often the largest norm must have been reached before it is taken for the ceiling of a clipping."""

    def __init__(self, guard: "Guard", optimizer: torch.optim.Optimizer) -> None:
        self.optimizer: torch.optim.Optimizer | None = optimizer
        self.stepping = False
        self._guard = guard
        self._ceiling, self._reached, self._warned = 0.0, 0, False
        self._hook = optimizer.register_step_pre_hook(eagerly(self._before))

    def remove(self) -> None:
        r"""Stop watching; the guard stays attached. Does nothing the second time."""
        self.optimizer = None
        self._hook.remove()

    def _before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The optimizer itself comes first among the positional arguments that a hook is given.
        if any(callable(argument) for argument in (*args[1:], *kwargs.values())):
            raise StateError(
                "optimizer.step(closure) computes its gradient after guard.watch() has looked; call backward() and "
                "guard.step() in the loop, then optimizer.step() without a closure"
            )
        self.stepping = True
        try:
            event = self._guard.step(self._norm(optimizer), optimizer=optimizer)
        finally:
            self.stepping = False
        self._notice_clipping(event.norm)

    def _norm(self, optimizer: torch.optim.Optimizer) -> Tensor:
        norm = gradient_norm(self._guard.model)
        scale = getattr(optimizer, "grad_scale", None)
        return norm if scale is None else norm / scale.to(norm.device)

    def _notice_clipping(self, norm: float) -> None:
        # clip_grad_norm_ meets its bound to about 1e-6; free norms do not agree so well five times over.
        if norm > self._ceiling * (1 + 1e-5):
            self._ceiling, self._reached = norm, 1
        elif norm >= self._ceiling * (1 - 1e-5):
            self._reached += 1
        if self._reached == self.repeats and self._ceiling > 0 and not self._warned:
            self._warned = True
            _log.warning(
                "the gradient norm has been %.4g, and never more, in %d steps: it seems to be clipped before "
                "guard.watch() sees it, which hides spikes; take norm = clip_grad_norm_(...) and call "
                "guard.step(grad_norm=norm) in the loop instead",
                self._ceiling,
                self.repeats,
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        # Copies of an optimizer have no hooks, so the copy of a guard is not watching.
        return None


def refuse_line_search(optimizer: object = None) -> None:
    r"""Refuse to work inside an optimizer that evaluates its closure several times a step.

    Args:
        optimizer: The optimizer, if it is known; else the callers are looked at.

    Raises:
        StateError: If the optimizer is :class:`torch.optim.LBFGS` or its step is among the callers.
    """
    if _inside_lbfgs() if optimizer is None else isinstance(optimizer, torch.optim.LBFGS):
        raise StateError(
            "LBFGS compares losses of several evaluations within one step, and a fold between two of them would "
            "change the function under its search; guard optimizers that take one gradient a step"
        )


def _inside_lbfgs() -> bool:
    # Frames are told by their globals: looking a name up in each would fetch one more dictionary from memory.
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_globals is _LBFGS_GLOBALS:
            return True
        frame = frame.f_back
    return False
