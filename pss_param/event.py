# SPDX-License-Identifier: Apache-2.0
r"""What one step of a guard saw and did."""

import math
from dataclasses import dataclass

__all__ = ["Event"]


@dataclass(frozen=True)
class Event:
    r"""The outcome of :meth:`pss_param.Guard.step`; prints as one line.

    Attributes:
        step: Number of the step, from 1.
        triggered: Whether gates were opened: the next forward pass reads smoothed weights.
        norm: Global gradient norm that was judged.
        ratio: The norm over its running average, dimensionless; NaN when no detector keeps one.
        reason: Why it triggered, was held back or was skipped; empty on a quiet step.
        smoothed: Names of the weights whose gates were opened.
        skip: Whether this step's gradients were dropped (set to None), so that ``optimizer.step()`` changes nothing of
            the guarded module, nor of anything else that it moves if ``step`` was given the optimizer.
        held: Whether this is no new trigger: weights above their levels, in the steps after one, are held there.

    Example:
        >>> print(Event(step=7, triggered=False, norm=1.5, ratio=1.02))
        step 7: norm 1.5, ratio 1.02
        >>> print(Event(8, True, 6.0, 4.0, "gradient norm jumped", ("a.weight", "b.weight")))
        step 8: smoothing 2 weights: gradient norm jumped
    """

    step: int
    triggered: bool
    norm: float
    ratio: float = math.nan
    reason: str = ""
    smoothed: tuple[str, ...] = ()
    skip: bool = False
    held: bool = False

    def __str__(self) -> str:
        r"""Tell the event in one line.

        Returns:
            Step, what was done, and why.
        """
        deeds = [f"smoothing {len(self.smoothed)} weight{'s' * (len(self.smoothed) != 1)}"] * self.triggered
        deeds += ["gradients dropped"] * self.skip
        if deeds:
            return f"step {self.step}: {', '.join(deeds)}: {self.reason}"
        ratio = "" if math.isnan(self.ratio) else f", ratio {self.ratio:.3g}"
        held = f" ({self.reason})" if self.reason else ""
        return f"step {self.step}: norm {self.norm:.4g}{ratio}{held}"
