# SPDX-License-Identifier: Apache-2.0
"""Methods that scale down the gradient: to a fixed norm, and to one that follows the run."""

import statistics

from torch import nn

from .base import Method, gradient_norm, scale_gradients


class GradientClipping(Method):
    r"""Scale the gradient down to a norm of at most 1.

    .. math:: g \leftarrow g \cdot \min(1, c / \lVert g \rVert_2)

    Args:
        limit: the largest norm, `c`.

    References:
        Pascanu et al., "On the difficulty of training recurrent neural networks", arXiv 1211.5063;
        `torch.nn.utils.clip_grad_norm_`.
    """

    def __init__(self, limit: float = 1.0) -> None:
        self.limit = limit

    def before_step(self, step: int, loss: float) -> bool:
        """Clip.

        Args:
            step: not used.
            loss: not used.

        Returns:
            True.
        """
        self.events += float(nn.utils.clip_grad_norm_(self.model.parameters(), self.limit)) > self.limit
        return True


class ZClip(Method):
    r"""Scale a gradient whose norm is an outlier down, the further the more it sticks out.

    With mean :math:`\mu` and variance :math:`v` of the norm,

    .. math:: z = (\lVert g \rVert - \mu) / (\sqrt v + 10^{-6}), \qquad
        z > z_0 \Rightarrow \lVert g \rVert \leftarrow \mu + \sqrt v \, z_0^2 / z,

    after which the norm as it now is enters both averages,

    .. math:: \mu \leftarrow \alpha \mu + (1 - \alpha) g, \qquad v \leftarrow \alpha v + (1 - \alpha) (g - \mu)^2

    (the new mean in the second). The first 25 norms give the first mean and the population variance. As in the
    authors' code and its example, a fixed limit of 1 holds besides, in the first 25 steps too; it does not enter the
    averages.

    Args:
        alpha: weight of the past per step.
        z_threshold: the largest z that is left alone, `z_0`.
        warmup_steps: norms collected before the first decision.
        limit: the fixed limit.

    References:
        Kumar et al., "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", arXiv 2504.02507;
        github.com/bluorion-com/ZClip, `mode="zscore"`, `clip_option="adaptive_scaling"`, `clip_factor=1`.
    """

    def __init__(
        self, alpha: float = 0.97, z_threshold: float = 2.5, warmup_steps: int = 25, limit: float = 1.0
    ) -> None:
        self.alpha, self.z_threshold, self.warmup_steps, self.limit = alpha, z_threshold, warmup_steps, limit
        self.first: list[float] = []
        self.mean = self.variance = 0.0

    def before_step(self, step: int, loss: float) -> bool:
        """Clip.

        Args:
            step: not used.
            loss: not used.

        Returns:
            True.
        """
        norm = gradient_norm(self.model)
        allowed = min(self.allowed(norm), self.limit)
        if norm > allowed:
            scale_gradients(self.model, allowed / (norm + 1e-6))
            self.events += 1
        return True

    def allowed(self, norm: float) -> float:
        """Judge one norm and let it enter the averages.

        Args:
            norm: norm of the gradient.

        Returns:
            The norm that is left of it, without the fixed limit.
        """
        if len(self.first) < self.warmup_steps:
            self.first.append(norm)
            self.mean, self.variance = statistics.fmean(self.first), statistics.pvariance(self.first)
            return norm
        deviation = self.variance**0.5
        z = (norm - self.mean) / (deviation + 1e-6)
        kept = self.mean + deviation * self.z_threshold**2 / z if z > self.z_threshold else norm
        self.mean = self.alpha * self.mean + (1 - self.alpha) * kept
        self.variance = self.alpha * self.variance + (1 - self.alpha) * (kept - self.mean) ** 2
        return kept
