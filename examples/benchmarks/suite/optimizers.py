# SPDX-License-Identifier: Apache-2.0
"""AdamW, SGD with momentum, and Muon, each as one object whose groups remember their rate in ``base_lr``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .muon import StackedMuon

BETAS = (0.9, 0.95)
MOMENTUM = 0.9
WEIGHT_DECAY = {"adamw": 0.1, "sgd": 0.0, "muon": 0.1}
"""Of matrices and kernels; vectors (biases, norms) never decay."""

Group = dict[str, Any]


class Together:
    """Several optimizers that act as one.

    Args:
        parts: the optimizers; their groups keep their order.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[Group]:
        """The groups of all parts, the real ones."""
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:
        """The state of all parts by parameter, as a new dictionary."""
        return {p: state for part in self.parts for p, state in part.state.items()}

    def step(self) -> None:
        """Update every parameter."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The states of the parts in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)


def decaying(named: list[tuple[str, nn.Parameter]], weight_decay: float) -> list[Group]:
    """Two groups: what has two or more dimensions decays, vectors do not."""
    matrices, vectors = [p for _, p in named if p.ndim > 1], [p for _, p in named if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def muon(named: list[tuple[str, nn.Parameter]], lr: float, weight_decay: float) -> Together:
    """Muon for the matrices inside ``layers``, at steps of AdamW's size (arXiv 2502.16982), and AdamW for the rest."""
    block = {name for name, p in named if p.ndim == 2 and "layers." in name}
    matrices = [p for name, p in named if name in block]
    rest = decaying([pair for pair in named if pair[0] not in block], weight_decay)
    return Together(
        StackedMuon(matrices, lr, weight_decay),
        torch.optim.AdamW(rest, lr=lr, betas=BETAS, fused=True),
    )


def make_optimizer(
    kind: str, model: nn.Module, lr: float, weight_decay: float | None = None
) -> torch.optim.Optimizer | Together:
    """Make an optimizer for all parameters that are trained.

    Args:
        kind: ``adamw`` (betas 0.9 and 0.95), ``sgd`` (momentum 0.9) or ``muon``.
        model: whose parameters.
        lr: learning rate of every group.
        weight_decay: of matrices; ``None`` for the kind's own in :data:`WEIGHT_DECAY`.

    Returns:
        The optimizer; every group has ``base_lr`` beside ``lr``.

    Raises:
        KeyError: there is no such kind.
    """
    decay = WEIGHT_DECAY[kind] if weight_decay is None else weight_decay
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer | Together
    if kind == "muon":
        optimizer = muon(named, lr, decay)
    elif kind == "sgd":
        optimizer = torch.optim.SGD(decaying(named, decay), lr=lr, momentum=MOMENTUM, fused=True)
    else:
        optimizer = torch.optim.AdamW(decaying(named, decay), lr=lr, betas=BETAS, fused=True)
    for group in optimizer.param_groups:
        group["base_lr"] = lr
    return optimizer
