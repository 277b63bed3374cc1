# SPDX-License-Identifier: Apache-2.0
"""Methods that change the learning rate or the weight decay."""

import torch
from torch import nn

import pss_param as pss

from .base import Method, gradient_norm


class HalveRate(Method):
    r"""Halve the learning rate for ever whenever the gradient norm spikes.

    .. math:: \lVert g_t \rVert \ge 2.5 \, a_t \Rightarrow \eta \leftarrow \eta / 2

    with the running average :math:`a_t` of `pss_param.GradientNormRatio`: the detector of the guard with another cure.
    The halved rate holds from the next step on; for 10 steps after a halving there is no other.

    Args:
        threshold: the ratio.
        cooldown: steps without another halving.

    References:
        Lowering the rate by hand after a divergence is common practice, in OPT-175B for example (arXiv 2205.01068);
        this automatic form is ours.
    """

    def __init__(self, threshold: float = 2.5, cooldown: int = 10) -> None:
        self.detector = pss.GradientNormRatio(threshold)
        self.cooldown, self.resting = cooldown, 0

    def lr_scale(self, step: int) -> float:
        """The halvings so far.

        Args:
            step: not used.

        Returns:
            A power of 1/2.
        """
        return 0.5**self.events

    def before_step(self, step: int, loss: float) -> bool:
        """Watch the gradient norm.

        Args:
            step: not used.
            loss: not used.

        Returns:
            True.
        """
        spike = self.detector.observe(gradient_norm(self.model)).triggered
        if spike and not self.resting:
            self.events, self.resting = self.events + 1, self.cooldown
        else:
            self.resting = max(0, self.resting - 1)
        return True


class WarmUp(Method):
    r"""Raise the learning rate linearly over the first tenth of the run.

    .. math:: \eta_t = \eta \min(1, (t + 1) / \operatorname{round}(0.1 \, T))

    Args:
        share: of the steps.

    References:
        Goyal et al., arXiv 1706.02677; Vaswani et al., arXiv 1706.03762.
    """

    def __init__(self, share: float = 0.1) -> None:
        self.share, self.length = share, 1

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int) -> None:
        """Learn the length of the run.

        Args:
            model: not used.
            optimizer: not used.
            total_steps: how long the run will be.
        """
        self.length = max(1, round(self.share * total_steps))

    def lr_scale(self, step: int) -> float:
        """The ramp.

        Args:
            step: number of the step, from 0.

        Returns:
            The factor, at most 1.
        """
        return min(1.0, (step + 1) / self.length)


class NoWeightDecay(Method):
    """Switch weight decay off.

    A control: decoupled weight decay shrinks all directions of a matrix alike.

    References:
        Loshchilov and Hutter, arXiv 1711.05101.
    """

    def optimizer_options(self) -> dict[str, float]:
        """No decay.

        Returns:
            The option.
        """
        return {"weight_decay": 0.0}
