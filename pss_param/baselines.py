# SPDX-License-Identifier: Apache-2.0
r"""How weights were in health: slow averages of stable rank and spectral norm, one number for each matrix.

Everything is float64 on the host; :class:`pss_param.StableRankFloor` says what the numbers are and what follows.

# Note [What teaches]
A weight that fires does not move its stable rank's baseline, however often it is smoothed and collapses again; norms
teach nothing during an alert, nor does what was measured in the step that began one. What is not finite, or zero, is no
measurement.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pss_param.detector import Matrix, Origin
from pss_param.edges import init_level

__all__ = ["NUMBERS", "Baselines", "Compared", "count_of"]

NUMBERS = ("baseline", "level", "usual", "left")
"""What a saved detector holds of them."""


class Compared(NamedTuple):
    r"""What a measurement says beside the baselines, one number for each matrix.

    Attributes:
        fall: Stable rank over its baseline.
        rise: Spectral norm over its baseline.
        pace: Growth of the norm per step since the last measurement, from what a smoothing at it left.
        high: Whether the norm is above its baseline by more than can be left from a smoothing.
    """

    fall: Tensor
    rise: Tensor
    pace: Tensor
    high: Tensor


class Baselines:
    r"""The averages of all matrices that a detector watches.

    Args:
        matrices: How the weight of each begins, and the matrices themselves, of which only shapes count.
        decay: Of the averages, per step.

    Attributes:
        baseline: Of the stable ranks; never above that of independent entries.
        level: Of the spectral norms; never below ``usual``.
        usual: The norm that the initialiser gives, and the room that the weight has beyond.
        left: The norm at the last measurement, or what a smoothing then left of it.

    Example:
        >>> healthy = Baselines([(Origin(std=1.0), torch.zeros(4, 4))], decay=0.99)
        >>> healthy.settle(torch.tensor([0.8]), torch.tensor([5.0]))
        >>> healthy.level.tolist(), healthy.compare(torch.tensor([0.4]), torch.tensor([10.0]), 1).fall.tolist()
        ([5.0], [0.5])
    """

    slack = 1.05
    """Norms this far above their baseline are let be: a smoothing to within 1 % of ``||W||_F`` is no closer."""
    own_start = (0.1, 0.5)
    """A first norm between these, in norms that the initialiser gives, was given by another initialiser."""

    def __init__(self, matrices: Sequence[tuple[Origin, Matrix]], decay: float) -> None:
        self.decay = decay
        each = [(origin, *matrix.shape[-2:]) for origin, matrix in matrices for _ in range(count_of(matrix))]
        self.fresh = _numbers(m * n / (math.sqrt(m) + math.sqrt(n)) ** 2 for _, m, n in each)
        self.usual = _numbers(init_level(m, n, origin.std) for origin, m, n in each)
        self.room = _numbers(origin.room for origin, _, _ in each)
        self.baseline, self.level, self.left, self._before = (torch.zeros_like(self.fresh) for _ in range(4))

    def settle(self, ranks: Tensor, norms: Tensor) -> None:
        r"""Begin with the weights of the first step.

        Args:
            ranks: Stable ranks.
            norms: Spectral norms.
        """
        self.baseline = torch.minimum(ranks.to(self.fresh), self.fresh)
        least, most = (share * self.usual for share in self.own_start)
        self.usual = self.room * torch.where((norms > least) & (norms < most), norms.to(self.usual), self.usual)
        self.level = self.usual
        self._learn(norms, ranks, 0.0)

    def compare(self, ranks: Tensor, norms: Tensor, elapsed: int) -> Compared:
        r"""Put a measurement beside the baselines, and beside the last one.

        Args:
            ranks: Stable ranks.
            norms: Spectral norms.
            elapsed: Steps since the last measurement.

        Returns:
            Their quotients; 1, and a pace of 0, where there is nothing to compare with.
        """
        fall, rise = _quotients(ranks, self.baseline), _quotients(norms, self.level)
        pace = _quotients(norms, self.left) ** (1 / max(1, elapsed)) - 1
        self.left = norms
        return Compared(fall, rise, pace, rise > self.slack)

    def follow(self, ranks: Tensor, norms: Tensor, fires: Tensor, elapsed: int, alert: bool) -> None:
        r"""Let the averages follow: Note [What teaches].

        Args:
            ranks: Stable ranks.
            norms: Spectral norms.
            fires: Which matrices do.
            elapsed: Steps since the last measurement.
            alert: Whether the norms' averages stay.
        """
        kept = self.decay**elapsed
        stays = fires | ~torch.isfinite(ranks)
        followed = torch.where(stays, self.baseline, kept * self.baseline + (1 - kept) * ranks)
        # A weight of zeros has no stable rank; it is watched from the first one that it has.
        known = torch.isfinite(self.baseline) & (self.baseline > 0)
        self.baseline = torch.minimum(torch.where(known, followed, ranks), self.fresh)
        self._before = self.level
        if not alert:
            self._learn(norms, ranks, kept)

    def unlearn(self) -> None:
        r"""Forget what the last measurement taught of norms."""
        self.level = torch.where(self._before > 0, self._before, self.level)

    def lower(self) -> None:
        r"""Note that what is above its level is being smoothed down to it, and grows from there."""
        smoothed = (self.level > 0) & (self.left > self.slack * self.level)
        self.left = torch.where(smoothed, self.level, self.left)

    def state(self) -> dict[str, Tensor]:
        r"""Hold what a resumed run needs.

        Returns:
            Copies of :data:`NUMBERS`.
        """
        return {name: getattr(self, name).clone() for name in NUMBERS}

    def load(self, state: Mapping[str, Tensor]) -> None:
        r"""Take that back.

        Args:
            state: What :meth:`state` returned.
        """
        for name in NUMBERS:
            setattr(self, name, state[name].detach().to("cpu", copy=True))

    def _learn(self, norms: Tensor, ranks: Tensor, kept: float) -> None:
        # Of a matrix that looks flatter than independent entries are, the norm of such a one counts.
        healthy = norms * (ranks / self.fresh).clamp_min(1).sqrt()
        followed = torch.maximum(kept * self.level + (1 - kept) * healthy, self.usual)
        self.level = torch.where(torch.isfinite(healthy) & (healthy > 0), followed, self.level)


def count_of(matrix: Matrix) -> int:
    r"""Count the matrices of a batch.

    Args:
        matrix: ``(..., m, n)``.

    Returns:
        How many there are.
    """
    return math.prod(matrix.shape[:-2])


def _numbers(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64, device="cpu")


def _quotients(now: Tensor, then: Tensor) -> Tensor:
    """How many times what it was; 1 where there is nothing to compare with."""
    return torch.where((then > 0) & torch.isfinite(now), now / then, 1.0)
