# SPDX-License-Identifier: Apache-2.0
"""PyTorch's Muon, quick on a CPU: the Newton-Schulz steps of all matrices of a shape are done at once, in float32."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

STEP_SIZE_OF_ADAMW = 0.2
"""Root mean square of an AdamW update, to which those of Muon are scaled (arXiv 2502.16982)."""
COEFFICIENTS = (3.4445, -4.775, 2.0315)
NEWTON_SCHULZ_STEPS = 5
EPS = 1e-7


class StackedMuon(torch.optim.Optimizer):
    """The update of ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")``, which goes matrix by matrix in bfloat16.

    Args:
        params: matrices.
        lr: learning rate.
        weight_decay: decoupled, per step times ``lr``.
        momentum: of the running mean of gradients, with Nesterov's look ahead.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.1, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every matrix that has a gradient.

        Args:
            closure: not supported.
        """
        for group in self.param_groups:
            for parameters in by_shape(group["params"]):
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        directions = orthogonalize(torch.stack([self._momentum(p, group["momentum"]) for p in parameters]))
        shrink = 1 - group["lr"] * group["weight_decay"]
        step = group["lr"] * STEP_SIZE_OF_ADAMW * math.sqrt(max(parameters[0].shape))
        for p, direction in zip(parameters, directions, strict=True):
            p.mul_(shrink).sub_(direction, alpha=step)

    def _momentum(self, p: Tensor, momentum: float) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return p.grad.lerp(state["momentum_buffer"].lerp_(p.grad, 1 - momentum), momentum)


def by_shape(parameters: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Group what has a gradient."""
    found: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for p in parameters:
        if p.grad is not None:
            found[p.shape].append(p)
    return found.values()


def orthogonalize(updates: Tensor) -> Tensor:
    r"""Move all singular values towards 1 by Newton-Schulz steps.

    .. math:: X \leftarrow a X + (b A + c A^2) X, \quad A = X X^\top

    Args:
        updates: ``(matrices, m, n)``.

    Returns:
        The same shape.
    """
    a, b, c = COEFFICIENTS
    tall = updates.shape[-2] > updates.shape[-1]
    X = updates.mT if tall else updates
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(NEWTON_SCHULZ_STEPS):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X
