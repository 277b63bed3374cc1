# SPDX-License-Identifier: Apache-2.0
r"""What a guard does besides smoothing: with the spiking gradient, with optimizer state, with too many triggers."""

import math
from dataclasses import dataclass
from typing import Literal

from pss_param.errors import ArgumentError, NonFiniteError

__all__ = ["GuardPolicy"]

OnTrigger = Literal["smooth", "smooth_and_clip", "smooth_and_skip"]
Prepare = Literal["auto", "lazy", "eager"]
_CHOICES = {
    "on_trigger": ("smooth", "smooth_and_clip", "smooth_and_skip"),
    "prepare": ("auto", "lazy", "eager"),
}


@dataclass(frozen=True)
class GuardPolicy:
    r"""How a guard acts on what its detector says.

    The defaults stand beside other choices in ``examples/benchmarks/results/stability.md``, "policy, of the default".

    Attributes:
        on_trigger: What happens to the gradient that triggered. ``"smooth"`` (default, as published): nothing, the
            optimizer uses it. ``"smooth_and_clip"``: it is scaled down to the norm that would just have triggered
            (threshold times average; a detector without a norm scales nothing). ``"smooth_and_skip"``: it is dropped
            (set to None).
        cooldown: Steps after a trigger in which another one is held back; 0 as published. Weights are held at their
            levels all the same (``Event.held``).
        max_trigger_rate: The budget as a share of the steps, in (0, 1]; more triggers are warned of, once per run.
            It is granted for the first 500 steps at once (0.01: five triggers), because most come early. The published
            rate is below 0.0025.
        max_nonfinite: Non-finite gradient norms in a row that are skipped before an error is raised, at least 1.
        reset_moments: Whether the optimizer's state of a smoothed weight is cleared when the smoothing is folded.
            Needs ``guard.step(optimizer=...)``.
        prepare: When dominant directions are computed: ``"lazy"`` at the next read, ``"eager"`` inside ``step()``
            as compiled programs need it, ``"auto"`` (default) eager as soon as a compiled program has read a guarded
            weight of a model of this class. Eager directions are those of the weight before the optimizer's update.
        seed: Seed of the views' own random generators.
        deferred: Whether a gradient is judged in the next step, so that the host never waits for the device. A spike
            is then smoothed one step later, so ``on_trigger`` can only be ``"smooth"``; non-finite gradients become
            zeros on the device instead of None, and are counted and reported one step later. A spike that lasts may
            trigger twice in a row, since the second gradient was made before the first was judged.
        damping: What the optimizer's updates of a weight are divided by, once more for each time that it is smoothed,
            at least 1; the product is at most 64 and halves in 69 steps. 1 damps nothing, as published. Needs an
            optimizer that is a :class:`torch.optim.Optimizer`, and in its step room for a copy of the damped weights
            and of what follows them (``pace``).
        pace: Growth per step of a weight's spectral norm that is fast enough, above 0. Where the detector measures it,
            at the edge ``baseline``, ``damping`` only says whether to damp: updates of a smoothed weight are divided by
            its growth over this, if that is more than 1, and those of biases, norms and whatever else is neither
            guarded nor an embedding or output head by the geometric mean over the guarded weights, or by 2 for each
            spike of the gradient if that is more.

    Raises:
        ArgumentError: If a value is out of its range.

    Example:
        >>> GuardPolicy(cooldown=10).on_trigger
        'smooth'
    """

    on_trigger: OnTrigger = "smooth"
    cooldown: int = 0
    max_trigger_rate: float = 0.01
    max_nonfinite: int = 20
    reset_moments: bool = False
    prepare: Prepare = "auto"
    seed: int = 0
    deferred: bool = False
    damping: float = 2**0.5
    pace: float = 0.003

    def over_budget(self, triggers: int, steps: int) -> bool:
        r"""Tell whether there were more triggers than the budget grants.

        Args:
            triggers: Triggers so far.
            steps: Steps so far.

        Returns:
            Whether the triggers exceed their share of the steps, or of 500 steps while there are fewer.

        Example:
            >>> GuardPolicy().over_budget(5, 20), GuardPolicy().over_budget(6, 20), GuardPolicy().over_budget(6, 600)
            (False, True, False)
        """
        return triggers > self.max_trigger_rate * max(steps, 500)

    def refuse_more_nonfinite(self, count: int) -> None:
        r"""End a run whose gradients have not been finite for too long.

        Args:
            count: Non-finite gradient norms in a row.

        Raises:
            NonFiniteError: If there are as many as ``max_nonfinite``.

        Example:
            >>> GuardPolicy(max_nonfinite=3).refuse_more_nonfinite(2)
        """
        if count >= self.max_nonfinite:
            raise NonFiniteError(
                f"the gradient norm was not finite for {count} steps in a row; stop, and repair the last "
                "checkpoint with the command: pss-repair CHECKPOINT"
            )

    def __post_init__(self) -> None:
        r"""Check the ranges.

        Raises:
            ArgumentError: If a value is out of its range.
        """
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ArgumentError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.deferred and self.on_trigger != "smooth":
            raise ArgumentError(
                f"deferred=True sees a spike when its gradient is gone, so on_trigger must be 'smooth', "
                f"got {self.on_trigger!r}"
            )
        if self.cooldown < 0:
            raise ArgumentError(f"cooldown must be at least 0 steps, got {self.cooldown}")
        if not 0 < self.max_trigger_rate <= 1:
            raise ArgumentError(f"max_trigger_rate must lie in (0, 1], got {self.max_trigger_rate}; 1 never warns")
        if not 1 <= self.damping < math.inf:
            raise ArgumentError(f"damping must be at least 1 and finite, got {self.damping}; 1 damps nothing")
        if not self.pace > 0:
            raise ArgumentError(f"pace must be above 0, got {self.pace}; 0.003 is the default, damping=1 damps nothing")
        if self.max_nonfinite < 1:
            raise ArgumentError(f"max_nonfinite must be at least 1 step, got {self.max_nonfinite}")
