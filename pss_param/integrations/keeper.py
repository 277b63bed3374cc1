# SPDX-License-Identifier: Apache-2.0
r"""The life of a guard inside a trainer, the same for every trainer: attach, step, report, save, let go."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pss_param.attaching import attach
from pss_param.detector import Detector
from pss_param.errors import StateError
from pss_param.event import Event
from pss_param.guard import Guard
from pss_param.policy import GuardPolicy
from pss_param.smoothing import Smoothing
from pss_param.targets import TargetRules

__all__ = ["AttachOptions", "GuardKeeper"]


@dataclass(frozen=True)
class AttachOptions:
    r"""The arguments of :func:`pss_param.attach` besides the model, kept until the model is ready.

    Attributes:
        targets: A preset such as ``"linear"``, or rules.
        smoothing: A shape by name or as a callable, or a whole :class:`pss_param.Smoothing`.
        edge: The level to which dominant values are brought; None as in :func:`pss_param.attach`.
        detector: None for the default of :func:`pss_param.attach`. Copied at attach, so that every run starts fresh.
        policy: None for :class:`pss_param.GuardPolicy` with its defaults.

    Example:
        >>> AttachOptions(targets="all").attach(nn.Linear(4, 4)).steps
        0
    """

    targets: str | TargetRules = "linear"
    smoothing: str | Smoothing | Callable[[Tensor, Tensor], Tensor] = "clip"
    edge: str | None = None
    detector: Detector | None = None
    policy: GuardPolicy | None = None

    def attach(self, model: nn.Module) -> Guard:
        r"""Guard a model with these options.

        Args:
            model: The model.

        Returns:
            The guard.
        """
        return attach(model, self.targets, self.smoothing, self.edge, copy.deepcopy(self.detector), self.policy)


class GuardKeeper:
    r"""Hold the guard of a run, its state before and after the run, and what to log.

    Args:
        options: How to attach.

    Attributes:
        guard: The guard while a run is on, else None.

    Example:
        >>> keeper = GuardKeeper(AttachOptions(targets="all"))
        >>> _ = keeper.start(nn.Linear(4, 4))
        >>> _ = keeper.step(1.0)
        >>> keeper.metrics()
        {'pss_triggers': 0.0, 'pss_skipped': 0.0, 'pss_ratio': 1.0}
        >>> keeper.release()
        >>> keeper.state()["counters"]["steps"]
        1
    """

    def __init__(self, options: AttachOptions) -> None:
        self.options = options
        self.guard: Guard | None = None
        self._state: dict[str, Any] | None = None
        self._ratio, self._skipped = math.nan, 0

    def start(self, model: nn.Module, state: Mapping[str, Any] | None = None) -> Guard:
        r"""Attach to a model at the beginning of a run; a guard that an aborted run left is let go first.

        Args:
            model: The model, its weights loaded already.
            state: What :meth:`state` returned in the run that is resumed.

        Returns:
            The guard.
        """
        self.release()
        self._ratio, self._skipped = math.nan, 0
        self.guard = self.options.attach(model)
        if state is not None:
            self.guard.load_state_dict(state)
        return self.guard

    def step(self, grad_norm: float | Tensor | None, optimizer: torch.optim.Optimizer | None = None) -> Event:
        r"""Let the guard take its step, and remember what is to be logged.

        Args:
            grad_norm: Global gradient norm before clipping; None computes it.
            optimizer: The optimizer; see :meth:`pss_param.Guard.step` for when it is needed.

        Returns:
            The event.

        Raises:
            StateError: If no run is on.
        """
        if self.guard is None:
            raise StateError("the callback holds no guard outside of a training run; step() belongs into the run")
        event = self.guard.step(grad_norm, optimizer=optimizer)
        self._skipped += event.skip
        if math.isfinite(event.ratio):
            self._ratio = event.ratio if math.isnan(self._ratio) else max(self._ratio, event.ratio)
        return event

    def metrics(self) -> dict[str, float]:
        r"""Report the run so far and begin a new window for the ratio.

        Returns:
            ``pss_triggers`` and ``pss_skipped`` (steps; the latter since the run was begun or resumed), and
            ``pss_ratio``, the largest ratio since the last call, if the detector keeps one.
        """
        triggers = 0 if self.guard is None else self.guard.triggers
        found = {"pss_triggers": float(triggers), "pss_skipped": float(self._skipped)}
        if not math.isnan(self._ratio):
            found["pss_ratio"] = self._ratio
        self._ratio = math.nan
        return found

    def state(self) -> dict[str, Any] | None:
        r"""Give the guard's state, that of the last run after its end.

        Returns:
            What :meth:`pss_param.Guard.state_dict` returns; None before the first run.
        """
        return self._state if self.guard is None else self.guard.state_dict()

    def release(self) -> None:
        r"""Fold, detach and forget the guard; its state stays for a checkpoint that is written after the run."""
        if self.guard is not None:
            self._state = self.guard.state_dict()
            self.guard.detach()
            self.guard = None
