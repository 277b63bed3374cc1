# SPDX-License-Identifier: Apache-2.0
"""Detectors that look at nothing: controls for the question whether detection matters.

They also show how a detector of one's own is written: a subclass with `judge`, and whatever it must remember in a
buffer, so that `guard.state_dict()` has it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import pss_param as pss


class Scheduled(pss.Detector):
    """Fire for all weights at steps that are known beforehand: a subclass says which."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def reason(self, step: int) -> str:
        """Say whether it is time.

        Args:
            step: number of the step, from 1.

        Returns:
            Why the detector fires, or nothing.

        Raises:
            NotImplementedError: a subclass must say it.
        """
        raise NotImplementedError

    def judge(self, norm: float, seen: Sequence[Sequence[float]]) -> pss.Verdict:
        """Count.

        Args:
            norm: not used.
            seen: not used.

        Returns:
            All weights, or none.
        """
        self.count.add_(1)
        reason = self.reason(int(self.count))
        return pss.Verdict(True, None, math.nan, reason) if reason else pss.Verdict()


class Periodic(Scheduled):
    """Fire for all weights every so many steps, first at the end of the first period.

    Args:
        period: steps from one firing to the next; 1 fires always.

    Example:
        >>> detector = Periodic(2)
        >>> [detector.observe(1.0).triggered for _ in range(4)]
        [False, True, False, True]
    """

    def __init__(self, period: int) -> None:
        super().__init__()
        self.period = period

    def reason(self, step: int) -> str:
        """See whether a period is over.

        Args:
            step: number of the step, from 1.

        Returns:
            Why the detector fires, or nothing.
        """
        return "" if step % self.period else f"{self.period} steps are over"


class AtRandom(Scheduled):
    """Fire for all weights at random steps.

    Args:
        share: probability per step.
        seed: which steps; the same seed fires at the same steps, after a resumption too.

    Example:
        >>> detector = AtRandom(0.5)
        >>> 450 < sum(detector.observe(1.0).triggered for _ in range(1000)) < 550
        True
    """

    def __init__(self, share: float, seed: int = 0) -> None:
        super().__init__()
        self.share, self.seed = share, seed

    def reason(self, step: int) -> str:
        """Throw the dice of this step.

        Args:
            step: number of the step, from 1.

        Returns:
            Why the detector fires, or nothing.
        """
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + step)
        fires = float(torch.rand((), generator=generator)) < self.share
        return f"a throw of the dice ({self.share:.2%} of the steps)" if fires else ""
