# SPDX-License-Identifier: Apache-2.0
r"""Parametric singularity smoothing, and its ablations: all of them `pss_param.attach` with other arguments.

.. math:: W^* = W - U_k \, \mathrm{diag}(S_k - f(S_k)) \, V_k^H

for every target, when the detector fires. `events` counts triggers and the steps in which weights are held after one,
`held` these alone. Source: arXiv 2602.01308 and this package.
"""

from collections.abc import Callable

import torch
from torch import nn

import pss_param as pss

from .base import Method
from .triggers import AtRandom, Periodic

# Of the Frobenius norm, as `attach` has it for a shape that is given by name.
_TOLERANCE = 1e-2


class Guarded(Method):
    """Attach a guard, and step it before the optimizer.

    Args:
        **options: arguments of `pss_param.attach`; none for what a user gets who types `pss.attach(model)`.
    """

    def __init__(self, **options: object) -> None:
        self.options = options

    def fits(self, model: nn.Module) -> bool:
        """Whether the network has targets.

        Args:
            model: the network.

        Returns:
            The answer; "qk" finds none in a convolutional network.
        """
        targets = self.options.get("targets", "linear")
        rules = targets if isinstance(targets, pss.TargetRules) else pss.TargetRules(preset=str(targets))
        try:
            return bool(pss.select_parameters(model, rules).targets)
        except pss.ArgumentError:
            return False

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int) -> None:
        """Attach.

        Args:
            model: the network.
            optimizer: of which a policy may clear the moments.
            total_steps: not used.
        """
        self.guard, self.optimizer = pss.attach(model, **self.options), optimizer

    def before_step(self, step: int, loss: float) -> bool:
        """Fold, judge, open.

        After 20 gradients in a row that are not finite the guard raises `pss_param.NonFiniteError`, which tells the
        user to stop: the run is dead.

        Args:
            step: not used.
            loss: not used.

        Returns:
            False where the guard dropped the gradient (it was not finite).
        """
        event = self.guard.step(optimizer=self.optimizer)
        self.events += event.triggered
        self.held += event.held
        return not event.skip


_UNDAMPED = pss.GuardPolicy(damping=1)


def _published(detector: Callable[[], pss.Detector] = pss.GradientNormRatio, **options: object) -> Guarded:
    given = {"targets": "linear", "smoothing": "clip", "edge": "dominant", "policy": _UNDAMPED, **options}
    return Guarded(detector=detector(), **given)


def _undamped() -> Guarded:
    # Alerts are as long as is best without damping: longer ones lose more than they win.
    both = pss.AnyOf(pss.GradientNormRatio(), pss.StableRankFloor(alert=20))
    return Guarded(detector=both, policy=_UNDAMPED)


def _default(floor: dict[str, float] | None = None, leap: float | None = None, **policy: object) -> Guarded:
    """The default with other numbers in its watch over the weights, or in its policy."""
    watch = pss.StableRankFloor(**(floor or {}))
    watch.leap = watch.leap if leap is None else leap
    return Guarded(detector=pss.AnyOf(pss.GradientNormRatio(), watch), policy=pss.GuardPolicy(**policy))


def _floor(name: str, *values: float) -> dict[str, Callable[[], Guarded]]:
    return {f"default-{name}-{value:g}": lambda value=value: _default({name: value}) for value in values}


def _policy(name: str, *values: float) -> dict[str, Callable[[], Guarded]]:
    return {f"default-{name}-{value:g}": lambda value=value: _default(**{name: value}) for value in values}


class Retuned(Guarded):
    """The default with something changed that is no argument of `pss_param.attach`.

    Args:
        change: what to do with the guard, right after it was attached.
    """

    def __init__(self, change: Callable[[pss.Guard], None]) -> None:
        super().__init__()
        self.change = change

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int) -> None:
        """Attach and change.

        Args:
            model: the network.
            optimizer: see `Guarded`.
            total_steps: not used.
        """
        super().start(model, optimizer, total_steps)
        self.change(self.guard)


def _forgetting(factor: float) -> Callable[[], Guarded]:
    return lambda: Retuned(lambda guard: setattr(guard._damping, "forgetting", factor))


def _companions_left(guard: pss.Guard) -> None:
    guard._damping._companions = tuple


def _no_room(guard: pss.Guard) -> None:
    watch = next(part for part in guard.detector.modules() if isinstance(part, pss.StableRankFloor))
    watch.healthy.room.fill_(1.0)


def _ratio_beside(threshold: float) -> Callable[[], Guarded]:
    return lambda: Guarded(detector=pss.AnyOf(pss.GradientNormRatio(threshold=threshold), pss.StableRankFloor()))


def _unsmoothed(S: torch.Tensor, edge: torch.Tensor) -> torch.Tensor:
    return S


def _ratio(**options: float) -> Callable[[], Guarded]:
    return lambda: _published(lambda: pss.GradientNormRatio(**options))


def _changed(**options: object) -> Callable[[], Guarded]:
    return lambda: _published(**options)


def _fired_by(detector: Callable[[], pss.Detector]) -> Callable[[], Guarded]:
    return lambda: _published(detector)


FORMS: dict[str, Callable[[], Guarded]] = {
    # As a user types it, and as published: GradientNormRatio(2.5), clip, dominant edge, every block matrix, no damping.
    "pss-default": Guarded,
    "pss-published": _published,
    # What makes the difference: the default without damping; with the published edge; with neither; with the norm of a
    # fresh matrix for an edge, if that is above the published one.
    "pss-undamped": _undamped,
    "pss-dominant": lambda: Guarded(edge="dominant"),
    "pss-dominant-undamped": lambda: Guarded(edge="dominant", policy=_UNDAMPED),
    "pss-mild": lambda: Guarded(edge="mild", policy=_UNDAMPED),
    # Other shapes at the same edge.
    "pss-softplus": _changed(smoothing="softplus"),
    "pss-log": _changed(smoothing="log"),
    "pss-softmax": _changed(smoothing="softmax"),
    "pss-convolution": _changed(smoothing="convolution"),
    # Other edges; `init` takes the standard deviation that each target's initialiser draws with.
    "pss-bulk": _changed(edge="bulk"),
    "pss-init": _changed(edge="init"),
    # Simpler rules: S[0] := S[1]; k fixed at 4; all singular values equal (MSign on demand); noise of the same size.
    "pss-second": _changed(smoothing="second"),
    "pss-rank-4": lambda: Guarded(
        smoothing=pss.Smoothing(rank=4, tol=_TOLERANCE), detector=pss.GradientNormRatio(), policy=_UNDAMPED
    ),
    "pss-equal": _changed(smoothing="equal"),
    "pss-noise": _changed(smoothing="noise"),
    # Other detectors: the weights' stable rank alone.
    "pss-floor": _fired_by(pss.StableRankFloor),
    # The most that smoothing can do: every weight clipped at a fresh one's spectral norm after every step.
    "pss-always-init": lambda: _published(lambda: Periodic(1), edge="init"),
    # No detector at all: every step, every 20 steps, 1 % of the steps.
    "pss-always": _fired_by(lambda: Periodic(1)),
    "pss-periodic": _fired_by(lambda: Periodic(20)),
    "pss-random": _fired_by(lambda: AtRandom(0.01)),
    # Other settings of the published detector.
    **{f"pss-threshold-{value:g}": _ratio(threshold=value) for value in (1.5, 2, 3, 5, 10)},
    **{f"pss-decay-{value:g}": _ratio(decay=value) for value in (0.9, 0.99)},
    # Other weights.
    "pss-qk": _changed(targets="qk"),
    "pss-attention": _changed(targets="attention"),
    "pss-mlp": _changed(targets="mlp"),
}
DEFAULTS: dict[str, Callable[[], Guarded]] = {
    # The default with one thing changed: which weights, which shape, which half of the detector.
    **{f"default-{name}": lambda name=name: Guarded(targets=name) for name in ("qk", "attention", "mlp", "all")},
    **{f"default-{name}": lambda name=name: Guarded(smoothing=name) for name in ("log", "softplus")},
    "default-floor-alone": lambda: Guarded(detector=pss.StableRankFloor()),
    "default-threshold-1.5": _ratio_beside(1.5),
    "default-threshold-5": _ratio_beside(5.0),
    # Numbers of the watch over the weights, and of the policy.
    **_floor("fraction", 0.5, 0.8),
    **_floor("period", 5, 100),
    **_floor("decay", 0.9, 0.999),
    **_floor("alert", 0, 20, 100),
    **_floor("growth", 1.5, 4),
    "default-leap-0.02": lambda: _default(leap=0.02),
    "default-leap-0.15": lambda: _default(leap=0.15),
    **_policy("damping", 1, 2),
    **_policy("pace", 0.001, 0.01),
    **_policy("cooldown", 20),
    "default-smooth-and-clip": lambda: _default(on_trigger="smooth_and_clip"),
    "default-smooth-and-skip": lambda: _default(on_trigger="smooth_and_skip"),
    "default-reset-moments": lambda: _default(reset_moments=True),
    # What is no argument: how fast damping is forgotten, what follows it, and the room of recurrent matrices.
    **{f"default-forgetting-{factor:g}": _forgetting(factor) for factor in (0.95, 0.998)},
    "default-companions-left": lambda: Retuned(_companions_left),
    "default-no-room": lambda: Retuned(_no_room),
    # What damping does by itself, that is cutting the learning rate of what would have been smoothed.
    "default-damping-alone": lambda: Guarded(smoothing=_unsmoothed),
}
"""The default in training with one argument changed."""

FORMS |= DEFAULTS
"""The published method with one part changed, and then all forms of smoothing in the suite, by name."""
