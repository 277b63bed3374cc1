# SPDX-License-Identifier: Apache-2.0
r"""The stable-rank floor: a detector that watches the weights instead of the gradient."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pss_param.detector import Detector, Matrix, Verdict, WeightSource
from pss_param.errors import ArgumentError
from pss_param.estimate import stable_rank_estimates

__all__ = ["StableRankFloor"]

_STEPS = ("step", "fired", "seen", "elapsed")
_NOTHING = torch.empty(0, dtype=torch.float64, device="cpu")


class StableRankFloor(Detector):
    r"""Trigger for each weight whose stable rank falls below a fraction of its baseline.

    .. math::
        \operatorname{SR}(W_t) < \text{fraction} \cdot b_t, \qquad
        \operatorname{SR}(W) = \lVert W \rVert_F^2 / \sigma_1^2, \qquad
        b_{t+s} = \text{decay}^s\, b_t + (1 - \text{decay}^s)\, \operatorname{SR}(W_{t+s}), \quad
        b_0 = \operatorname{SR}(W_0),

    with :math:`W_0` the weights at the first step, so that what is loaded or initialised after attach is no collapse.
    Healthy training lowers stable ranks over hundreds of steps, and the baseline follows; a deadly learning rate
    lowers them within tens, and the baseline stays. It is never above the stable rank of independent entries,
    ``m n / (sqrt(m) + sqrt(n))^2``: a matrix that starts orthogonal, or was smoothed to be so, falls that far in
    health.

    It sees what the gradient norm hides: at large learning rates without warm-up gradients only shrink while the
    weights collapse. A weight that acts as several matrices (fused query/key/value, experts) is judged by the
    one that lost most.

    At a measurement each weight is read twice: once for its norm and once for half an iteration of power
    iteration, started from the vector of the last time. Weights move little in between, so the vector
    stays converged; at the first step, ``settle_iterations`` full iterations are made. :math:`\sigma_1` is estimated
    from below, so a stable rank is never underestimated and no trigger is owed to the estimate.

    The defaults come from a post-LN GPT of the suite in ``examples/benchmarks``: a floor that stays where it was at
    first cost 0.04 nats in 2,500 healthy steps, this one nothing measurable, and it learns at 32 times the rate.

    Args:
        fraction: The floor as a fraction of the baseline, in (0, 1), dimensionless.
        period: The most steps between two measurements, at least 1. They are denser at first and after a trigger: one
            every ``clamp(steps since / 5, 1, period)`` steps.
        decay: Of the baseline, per step, in (0, 1]. It starts as the stable rank at the first step and follows what is
            measured above the floor; 1 leaves it there for ever.
        seed: Seed of the start vectors.

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
    settle_iterations = 6
    """Full power iterations at the first look; the baseline's cap at a fresh stable rank hides what they leave."""
    denser = 5
    """Two looks lie apart by the steps since the start, or since a trigger, over this."""

    def __init__(self, fraction: float = 0.65, period: int = 25, decay: float = 0.99, seed: int = 0) -> None:
        super().__init__()
        if not 0 < fraction < 1:
            raise ArgumentError(f"fraction must lie in (0, 1), got {fraction}; 0.65 is the default")
        if period < 1:
            raise ArgumentError(f"period must be at least 1 step, got {period}")
        if not 0 < decay <= 1:
            raise ArgumentError(f"decay must lie in (0, 1], got {decay}; 0.99 is the default, 1 keeps the first value")
        self.fraction, self.period, self.decay, self.seed = float(fraction), int(period), float(decay), int(seed)
        self.names: tuple[str, ...] = ()
        self.owners: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        self.vectors: list[Tensor] = []
        self.fresh = self.baseline = _NOTHING
        self.measured = self.on_left = False
        # Steps: so far, at the last trigger, at the last measurement, and between that and the one before.
        self.step = self.fired = self.seen = self.elapsed = 0

    def bind(self, weights: WeightSource) -> None:
        r"""Learn names and shapes; values are measured at the first look, when the model is loaded and in its place.

        Args:
            weights: Returns the watched matrices by name.
        """
        current = weights()
        self.names, self.measured, self.on_left = tuple(current), False, False
        self.step = self.fired = self.seen = self.elapsed = 0
        self.owners = [name for name, parts in current.items() for part in parts for _ in range(_count(part))]
        matrices = [part for parts in current.values() for part in parts]
        self.sizes = [(part.shape[-2], part.shape[-1]) for part in matrices]
        self.vectors = [self._start(part) for part in matrices]
        fresh = [rank for part in matrices for rank in _fresh_ranks(part)]
        self.fresh = torch.tensor(fresh, dtype=torch.float64, device="cpu")
        self.baseline = torch.zeros_like(self.fresh)

    def look(self, weights: WeightSource) -> list[Tensor]:
        r"""Measure all stable ranks when it is time, one tensor for the whole model.

        Args:
            weights: Returns the watched matrices by name.

        Returns:
            One tensor: the current stable ranks in the order of ``names``, empty between two measurements.

        Raises:
            ArgumentError: If the weights are not those of :meth:`bind`.
        """
        vars(self)["step"] += 1  # every step comes here; a module's own way to set an attribute takes 20 times as long
        return [self._measure(weights())] if self._is_time() else [_NOTHING]

    def judge(self, norm: float, seen: Sequence[Sequence[float]]) -> Verdict:
        r"""Compare the measured stable ranks with the floor.

        Args:
            norm: Not used.
            seen: What :meth:`look` measured.

        Returns:
            The decision with the names of the weights below the floor.
        """
        (ranks,) = seen
        if not ranks:
            return Verdict()
        lowest = dict.fromkeys(self.names, math.inf)
        for name, now, then in zip(self.owners, ranks, self.baseline.tolist(), strict=True):
            lowest[name] = min(lowest[name], now / then if then > 0 else math.inf)
        self._follow(torch.tensor(ranks, dtype=torch.float64, device="cpu"), self.elapsed)
        low = tuple(name for name, value in lowest.items() if value < self.fraction)
        if not low:
            return Verdict()
        self.fired = self.step
        worst = min(low, key=lambda name: lowest[name])
        reason = f"stable rank of {len(low)} weight(s) fell below {self.fraction:g} x its baseline"
        return Verdict(True, low, reason=f"{reason} (lowest {lowest[worst]:.2f} x in {worst})")

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
        return self.step - self.seen >= max(1, min(self.period, (self.step - self.fired) // self.denser))

    def _follow(self, ranks: Tensor, elapsed: int) -> None:
        # A collapsed weight does not teach: its baseline stays, however often it is smoothed and collapses again.
        kept = self.decay**elapsed
        above = ranks >= self.fraction * self.baseline
        followed = torch.where(above, kept * self.baseline + (1 - kept) * ranks, self.baseline)
        # A weight of zeros has no stable rank; it is watched from the first one that it has.
        known = torch.isfinite(self.baseline) & (self.baseline > 0)
        self.baseline = torch.minimum(torch.where(known, followed, ranks), self.fresh)

    def _start(self, matrix: Matrix) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        vector = torch.randn((*matrix.shape[:-2], matrix.shape[-1], 1), generator=generator, device="cpu")
        return nn.functional.normalize(vector, dim=-2)

    def _settle(self, current: Mapping[str, tuple[Matrix, ...]]) -> None:
        for _ in range(2 * self.settle_iterations):
            ranks = self._iterate(current)
        self.baseline, self.measured = torch.minimum(ranks.cpu(), self.fresh), True

    def _iterate(self, current: Mapping[str, tuple[Matrix, ...]]) -> Tensor:
        # Vectors of length n are multiplied by W, those of length m by its transpose: half an iteration each.
        sides = [matrix.mT if self.on_left else matrix for matrices in current.values() for matrix in matrices]
        ranks, self.vectors = stable_rank_estimates(sides, self.vectors)
        self.on_left = not self.on_left
        return ranks.double()

    def get_extra_state(self) -> dict[str, Any]:
        r"""Hold the baseline and the warm vectors, without which a resumed run would measure other last bits.

        Sizes depend on the watched weights alone, so that the state of a guard that has not stepped yet can be the
        place into which ``torch.distributed.checkpoint`` loads one.

        Returns:
            The baseline, the vectors by position, the side of the matrices that they belong to, and the steps.
        """
        steps = {name: getattr(self, name) for name in _STEPS}
        flags = {"measured": int(self.measured), "on_left": int(self.on_left)}
        vectors = {str(i): vector for i, vector in enumerate(self._padded_vectors())}
        return {**steps, **flags, "baseline": self.baseline.clone(), "vectors": vectors}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        r"""Take the baseline and the warm vectors back.

        Args:
            state: What :meth:`get_extra_state` returned.

        Raises:
            ArgumentError: If it belongs to another set of weights.
        """
        saved = [state["vectors"][str(i)] for i in range(len(state["vectors"]))]
        if [vector.shape for vector in saved] != [vector.shape for vector in self._padded_vectors()]:
            raise ArgumentError(
                f"the saved detector watched {len(saved)} matrices and this one watches {len(self.vectors)} or others; "
                "attach with the same targets before loading"
            )
        self.measured, self.on_left = bool(state["measured"]), bool(state["on_left"])
        rows = [m if self.on_left else n for m, n in self.sizes]
        self.vectors = [old[..., :row, :].clone() for old, row in zip(saved, rows, strict=True)]
        self.baseline = state["baseline"].detach().to("cpu", copy=True)
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
        return f"fraction={self.fraction:g}, period={self.period}, decay={self.decay:g}"


def _count(matrix: Matrix) -> int:
    return math.prod(matrix.shape[:-2])


def _fresh_ranks(matrix: Matrix) -> list[float]:
    m, n = matrix.shape[-2:]
    return [m * n / (math.sqrt(m) + math.sqrt(n)) ** 2] * _count(matrix)
