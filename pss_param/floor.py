# SPDX-License-Identifier: Apache-2.0
r"""The stable-rank floor: a detector that watches the weights instead of the gradient, and knows how they were.

# Note [Pace]
What tells a deadly learning rate from a healthy one before anything has collapsed is how fast norms grow: by tenths of
a percent a step in health, by five to fifty percent under a rate that kills, from the first steps on. (Recurrent cells
that learn from scratch are the exception that was met: their norms leap so in health too, but below the level at which
they are held, :mod:`pss_param.room`.) The pace is the growth since the last measurement, per step, from what a
smoothing at that measurement left. It triggers (``leap``), and it tells the guard by how much a weight's updates are
too large (:class:`pss_param.GuardPolicy`, ``pace``).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pss_param.baselines import NUMBERS, Baselines, Compared, count_of
from pss_param.detector import Detector, Matrix, Origin, Verdict, WeightSource
from pss_param.errors import ArgumentError
from pss_param.estimate import stable_rank_estimates

__all__ = ["StableRankFloor"]

_STEPS = ("step", "fired", "seen", "elapsed", "until")
_NOTHING = torch.empty(0, dtype=torch.float64, device="cpu")


class StableRankFloor(Detector):
    r"""Trigger for each weight whose stable rank falls below a fraction of what it was, or whose norm leaps.

    .. math::
        \operatorname{SR}(W_t) < \text{fraction} \cdot b_t \wedge \sigma_1(W_t) > \ell_t \quad \text{or} \quad
        \sigma_1(W_t) > \text{growth} \cdot \ell_t \quad \text{or} \quad
        p_t > \text{leap} \wedge \sigma_1(W_t) > \ell_t, \qquad
        \operatorname{SR}(W) = \lVert W \rVert_F^2 / \sigma_1^2,

    .. math::
        b_{t+s} = \text{decay}^s\, b_t + (1 - \text{decay}^s)\, \operatorname{SR}(W_{t+s}), \quad
        b_0 = \operatorname{SR}(W_0), \qquad \ell \text{ likewise of } \sigma_1,

    with the pace :math:`p_t = (\sigma_1(W_t) / \sigma_1(W_{t-s}))^{1/s} - 1` since the last measurement, and
    :math:`W_0` the weights at the first step, so that what is loaded or initialised after attach is no collapse.
    Healthy training lowers stable ranks and raises norms over hundreds of steps, and the baselines follow; a deadly
    learning rate does it within tens, and they stay. :math:`b` is never above the stable rank of independent entries,
    ``m n / (sqrt(m) + sqrt(n))^2``, nor :math:`\ell` below their spectral norm: a matrix that starts orthogonal, or
    was smoothed to be so, falls that far in health. And :math:`\ell` is never below the spectral norm that the weight's
    initialiser gives (PyTorch's ``Linear`` where it is not known), so that what starts as zeros may grow to that size.
    A first norm between a tenth and a half of that was given by another initialiser, and stands in its place. Matrices
    of recurrent cells have room for eight times as much: :mod:`pss_param.room`.

    It sees what the gradient norm hides: at large learning rates without warm-up gradients only shrink while the
    weights collapse, and Muon, whose updates have equal singular values, lets norms grow while stable ranks stay. A
    weight that acts as several matrices (fused query/key/value, experts) is judged by the worst one.

    **Alert.** After a trigger, its own or that of a detector beside it in :class:`pss_param.AnyOf`, it measures at
    every step for ``alert`` steps, names every weight whose norm is above :math:`\ell` by more than 5 %
    (``Verdict.held``: that is no new trigger), and lets :math:`\ell` stay: with the edge ``baseline``, which smooths to
    :math:`\ell`, the whole model is held at the norms that it had in health, for as long as something goes on firing.
    At other edges there are no alerts, and a fallen stable rank alone decides. With the edge ``baseline`` every verdict
    tells the paces of the weights above :math:`\ell` (``Verdict.pace``).

    At a measurement each weight is read twice: once for its norm and once for half an iteration of power
    iteration, started from the vector of the last time. Weights move little in between, so the vector
    stays converged; at the first step, ``settle_iterations`` full iterations are made. :math:`\sigma_1` is estimated
    from below, so no low stable rank is owed to the estimate.

    In ``examples/benchmarks/results/stability.md``, "watch over the weights, of the default", each default stands
    beside smaller and larger values; ``pss-default`` there is with the edge ``baseline`` and alerts of 50 steps,
    ``pss-dominant`` with the published edge.

    Args:
        fraction: The floor as a fraction of the baseline, in (0, 1), dimensionless.
        period: The most steps between two measurements, at least 1. They are denser at first and after a trigger: one
            every ``clamp(steps since / 5, 1, period)`` steps.
        decay: Of the baselines, per step, in (0, 1]. They start as what is measured at the first step; 1 leaves them
            there for ever. A stable rank below the floor is not followed.
        seed: Seed of the start vectors.
        alert: Steps after a trigger in which norms are held; 0 holds none.
        growth: The norm that triggers, in baselines, above 1; infinity ignores norms and how fast they grow.

    Raises:
        ArgumentError: If an argument is out of its range.

    Example:
        >>> weights = {"w": (torch.eye(8),)}
        >>> detector = StableRankFloor(period=1)
        >>> detector.bind(lambda: weights)
        >>> detector.judge(1.0, [part.tolist() for part in detector.look(lambda: weights)]).names
        ()
        >>> _ = weights["w"][0][0, 0].fill_(9.0)
        >>> for _ in range(8):
        ...     seen = detector.look(lambda: weights)
        >>> detector.judge(1.0, [part.tolist() for part in seen]).names
        ('w',)
    """

    parts = 1
    keeps_levels = True
    settle_iterations = 6
    """Full power iterations at the first look; the baseline's cap at a fresh stable rank hides what they leave."""
    denser = 5
    """Two looks lie apart by the steps since the start, or since a trigger, over this."""
    leap = 0.05
    """Growth per step, of a norm above its baseline, that triggers."""

    def __init__(
        self,
        fraction: float = 0.65,
        period: int = 25,
        decay: float = 0.99,
        seed: int = 0,
        alert: int = 50,
        growth: float = 2.0,
    ) -> None:
        super().__init__()
        if not 0 < fraction < 1:
            raise ArgumentError(f"fraction must lie in (0, 1), got {fraction}; 0.65 is the default")
        if period < 1:
            raise ArgumentError(f"period must be at least 1 step, got {period}")
        if not 0 < decay <= 1:
            raise ArgumentError(f"decay must lie in (0, 1], got {decay}; 0.99 is the default, 1 keeps the first value")
        if alert < 0:
            raise ArgumentError(f"alert must be at least 0 steps, got {alert}; 50 is the default")
        if not growth > 1:
            raise ArgumentError(f"growth must be above 1, got {growth}; 2 is the default, math.inf ignores growth")
        self.fraction, self.period, self.decay, self.seed = float(fraction), int(period), float(decay), int(seed)
        self.alert, self.growth = int(alert), float(growth)
        self.names: tuple[str, ...] = ()
        self.owners: list[str] = []
        self.places: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
        self.sizes: list[tuple[int, int]] = []
        self.vectors: list[Tensor] = []
        self.healthy = Baselines((), self.decay)
        self.measured = self.on_left = False
        self.holds, self._followed = True, -1
        self.origins: dict[str, Origin] = {}
        # Steps: so far, at the last trigger, at the last measurement, from the one before to it, at the alert's end.
        self.step = self.fired = self.seen = self.elapsed = self.until = 0

    def bind(self, weights: WeightSource) -> None:
        r"""Learn names and shapes; values are measured at the first look, when the model is loaded and in its place.

        Args:
            weights: Returns the watched matrices by name.
        """
        current = weights()
        self.names, self.measured, self.on_left = tuple(current), False, False
        self.step = self.fired = self.seen = self.elapsed = self.until = 0
        self._followed = -1
        parts = [(name, part) for name, several in current.items() for part in several]
        self.owners = [name for name, part in parts for _ in range(count_of(part))]
        self.places = _places(current)
        self.sizes = [(part.shape[-2], part.shape[-1]) for _, part in parts]
        self.vectors = [self._start(part) for _, part in parts]
        self.healthy = Baselines([(self.origins.get(name, Origin()), part) for name, part in parts], self.decay)

    def look(self, weights: WeightSource) -> list[Tensor]:
        r"""Measure all stable ranks and norms when it is time, one tensor for the whole model.

        Args:
            weights: Returns the watched matrices by name.

        Returns:
            One tensor: the current stable ranks in the order of ``names``, then the spectral norms; empty between two
            measurements.

        Raises:
            ArgumentError: If the weights are not those of :meth:`bind`.
        """
        vars(self)["step"] += 1  # every step comes here; a module's own way to set an attribute takes 20 times as long
        return [self._measure(weights())] if self._is_time() else [_NOTHING]

    def judge(self, norm: float, seen: Sequence[Sequence[float]]) -> Verdict:
        r"""Compare what was measured with the baselines.

        Args:
            norm: Not used.
            seen: What :meth:`look` measured.

        Returns:
            The decision with the names of the weights to smooth.
        """
        (measured,) = seen
        if not measured:
            return _UNMEASURED if self.holds else _SILENT
        ranks, norms = torch.tensor(measured, dtype=torch.float64, device="cpu").view(2, -1).unbind()
        seen_now = self.healthy.compare(ranks, norms, self.elapsed)
        fires = self._fires(seen_now)
        struck = self._owning(fires)
        held = self._owning(seen_now.high) if self.holds and self.alert and (struck or self._on_alert) else ()
        pace = self._paces(seen_now) if self.holds else None
        self.healthy.follow(ranks, norms, fires, self.elapsed, self._on_alert)
        self._followed = self.step
        if struck:
            self.fired = self.step
            self.alarm()
            return Verdict(True, struck, reason=self._reason(fires, seen_now), held=held, pace=pace)
        if not held:
            return Verdict(pace=pace)
        self.healthy.lower()
        reason = f"on alert until step {self.until}: {len(held)} weight(s) above the baseline of their norm"
        return Verdict(reason=reason, held=held, pace=pace)

    def hold(self, origins: Mapping[str, Origin] | None) -> None:
        r"""Learn whether weights are held at their baselines; norms trigger nothing, and nothing alerts, where not.

        Args:
            origins: How each weight begins, where the guard's edge is ``baseline``; else None.
        """
        self.holds, self.origins = origins is not None, dict(origins or {})

    def alarm(self) -> None:
        r"""Begin an alert, or prolong it; at an edge that holds nothing there is none."""
        if self._followed == self.step:
            self.healthy.unlearn()
        self.until = self.step + self.alert * self.holds
        if self.holds:
            self.healthy.lower()

    def levels(self, name: str) -> tuple[Tensor, ...]:
        r"""Tell the baselines of a weight's spectral norms.

        Args:
            name: The weight.

        Returns:
            Levels ``(...)`` for each of its matrices ``(..., m, n)``.
        """
        places = self.places.get(name, ()) if self.measured else ()
        return tuple(self.level[start : start + math.prod(shape)].reshape(shape) for start, shape in places)

    @property
    def baseline(self) -> Tensor:
        r"""Baselines of the stable ranks, one for each matrix in the order of ``names``."""
        return self.healthy.baseline

    @property
    def level(self) -> Tensor:
        r"""Baselines of the spectral norms, likewise."""
        return self.healthy.level

    def _owning(self, chosen: Tensor) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for name, one in zip(self.owners, chosen.tolist(), strict=True) if one))

    def _fires(self, seen: Compared) -> Tensor:
        low = seen.fall < self.fraction
        if not self.holds:
            return low
        # A stable rank may fall because the rest of the spectrum shrinks; then there is nothing to bring down.
        leaps = (seen.pace > self.leap) & math.isfinite(self.growth)
        return (seen.high & (low | leaps)) | (seen.rise > self.growth)

    def _paces(self, seen: Compared) -> dict[str, float]:
        paces: dict[str, float] = {}
        for name, pace, high in zip(self.owners, seen.pace.tolist(), seen.high.tolist(), strict=True):
            if high:
                paces[name] = max(pace, paces.get(name, pace))
        return paces

    def _reason(self, fires: Tensor, seen: Compared) -> str:
        count = len(self._owning(fires))
        falls, rises, paces = (
            torch.where(fires, value, usual).tolist()
            for value, usual in ((seen.fall, 1.0), (seen.rise, 1.0), (seen.pace, 0.0))
        )
        lowest, most, fastest = min(falls), max(rises), max(paces)
        if lowest < self.fraction:
            what = f"stable rank of {count} weight(s) fell below {self.fraction:g} x its baseline"
            return f"{what} (lowest {lowest:.2f} x in {self.owners[falls.index(lowest)]})"
        if most > self.growth:
            what = f"spectral norm of {count} weight(s) rose above {self.growth:g} x its baseline"
            return f"{what} (most {most:.2f} x in {self.owners[rises.index(most)]})"
        what = f"spectral norm of {count} weight(s) above its baseline grew by more than {self.leap:.0%} a step"
        return f"{what} (most {fastest:.0%} in {self.owners[paces.index(fastest)]})"

    @property
    def _on_alert(self) -> bool:
        return self.step <= self.until

    @torch.no_grad()
    def _measure(self, current: Mapping[str, tuple[Matrix, ...]]) -> Tensor:
        self.elapsed, self.seen = self.step - self.seen, self.step
        if tuple(current) != self.names:
            raise ArgumentError(
                f"StableRankFloor was bound to {len(self.names)} weights and now sees other ones "
                f"({len(current)}); attach a new guard after changing the model"
            )
        if not self.measured:
            self._settle(current)
        return self._iterate(current)

    def _is_time(self) -> bool:
        apart = max(1, min(self.period, (self.step - self.fired) // self.denser))
        return self._on_alert or self.step - self.seen >= apart

    def _start(self, matrix: Matrix) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        vector = torch.randn((*matrix.shape[:-2], matrix.shape[-1], 1), generator=generator, device="cpu")
        return nn.functional.normalize(vector, dim=-2)

    def _settle(self, current: Mapping[str, tuple[Matrix, ...]]) -> None:
        for _ in range(2 * self.settle_iterations):
            seen = self._iterate(current)
        ranks, norms = seen.cpu().view(2, -1).unbind()
        self.healthy.settle(ranks, norms)
        self.measured = True

    def _iterate(self, current: Mapping[str, tuple[Matrix, ...]]) -> Tensor:
        # Vectors of length n are multiplied by W, those of length m by its transpose: half an iteration each.
        sides = [matrix.mT if self.on_left else matrix for matrices in current.values() for matrix in matrices]
        ranks, norms, self.vectors = stable_rank_estimates(sides, self.vectors)
        self.on_left = not self.on_left
        return torch.cat([ranks, norms]).double()

    def get_extra_state(self) -> dict[str, Any]:
        r"""Hold the baselines and the warm vectors, without which a resumed run would measure other last bits.

        Sizes depend on the watched weights alone, so that the state of a guard that has not stepped yet can be the
        place into which ``torch.distributed.checkpoint`` loads one.

        Returns:
            The baselines, the vectors by position, the side of the matrices that they belong to, and the steps.
        """
        steps = {name: getattr(self, name) for name in _STEPS}
        flags = {"measured": int(self.measured), "on_left": int(self.on_left)}
        vectors = {str(i): vector for i, vector in enumerate(self._padded_vectors())}
        return {**steps, **flags, **self.healthy.state(), "vectors": vectors}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        r"""Take the baselines and the warm vectors back.

        Args:
            state: What :meth:`get_extra_state` returned.

        Raises:
            ArgumentError: If it belongs to another set of weights.
        """
        if not set(NUMBERS) <= set(state):
            raise ArgumentError("the saved detector has no baselines of norms, it is of an older version; begin anew")
        saved = [state["vectors"][str(i)] for i in range(len(state["vectors"]))]
        if [vector.shape for vector in saved] != [vector.shape for vector in self._padded_vectors()]:
            raise ArgumentError(
                f"the saved detector watched {len(saved)} matrices and this one watches {len(self.vectors)} or others; "
                "attach with the same targets before loading"
            )
        self.measured, self.on_left = bool(state["measured"]), bool(state["on_left"])
        rows = [m if self.on_left else n for m, n in self.sizes]
        self.vectors = [old[..., :row, :].clone() for old, row in zip(saved, rows, strict=True)]
        self.healthy.load(state)
        self._followed = -1
        for name in _STEPS:
            setattr(self, name, int(state[name]))

    def _padded_vectors(self) -> list[Tensor]:
        # Copies that are as long as the longer side, whichever side they belong to at the moment.
        longest = [max(size) for size in self.sizes]
        pairs = zip(self.vectors, longest, strict=True)
        return [nn.functional.pad(vector, (0, 0, 0, size - vector.shape[-2])) for vector, size in pairs]

    def extra_repr(self) -> str:
        r"""Describe the settings.

        Returns:
            The settings as they are passed to the constructor.
        """
        first = f"fraction={self.fraction:g}, period={self.period}, decay={self.decay:g}"
        return f"{first}, alert={self.alert}, growth={self.growth:g}"


_SILENT, _UNMEASURED = Verdict(), Verdict(pace={})


def _places(weights: Mapping[str, tuple[Matrix, ...]]) -> dict[str, list[tuple[int, tuple[int, ...]]]]:
    """Where the numbers of each of a weight's matrices begin, and their shape."""
    places: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
    start = 0
    for name, parts in weights.items():
        for part in parts:
            places.setdefault(name, []).append((start, tuple(part.shape[:-2])))
            start += count_of(part)
    return places
