# SPDX-License-Identifier: Apache-2.0
"""Skipping the step of a batch whose loss or gradient is an outlier."""

from collections import deque

import torch
from torch import Tensor

from .base import Method, gradient_norm


class SkipOutliers(Method):
    r"""Skip the update when the loss or the gradient norm exceeds the mean of the last 128 steps by 6 deviations.

    .. math:: \text{skip} \iff x_t - \operatorname{mean}(x_{t-n}, \dots, x_{t-1}) > 6 \operatorname{std}(x_{t-n}, \dots,
        x_{t-1}) \quad \text{for } x = \text{loss or } \lVert g \rVert, \quad n \le 128

    The sample deviation (n - 1); skipped steps enter the window too; nothing is skipped before 64 steps were seen. A
    value that is not finite is skipped, as in the source, and so is every step whose window holds one.

    Args:
        window: steps compared with.
        sigmas: deviations allowed.

    References:
        `SkipStepOptimizer` of github.com/allenai/OLMo-core (src/olmo_core/optim/skip_step_optimizer.py), its defaults.
    """

    def __init__(self, window: int = 128, sigmas: float = 6.0) -> None:
        self.window, self.sigmas = window, sigmas
        self.losses: deque[float] = deque(maxlen=window + 1)
        self.norms: deque[float] = deque(maxlen=window + 1)

    def before_step(self, step: int, loss: float) -> bool:
        """Compare loss and norm with their windows.

        Args:
            step: not used.
            loss: training loss of this step.

        Returns:
            Whether both are usual.
        """
        self.losses.append(loss)
        self.norms.append(gradient_norm(self.model))
        if len(self.losses) < max(2, self.window // 2):
            return True
        usual = self._usual(self.losses) and self._usual(self.norms)
        self.events += not usual
        return usual

    def _usual(self, seen: deque[float]) -> bool:
        values = torch.tensor(list(seen), dtype=torch.float64)
        deviation, mean = torch.std_mean(values[:-1])
        within: Tensor = values[-1] - mean <= self.sigmas * deviation
        return bool(within)
