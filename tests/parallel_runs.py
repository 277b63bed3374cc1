# SPDX-License-Identifier: Apache-2.0
"""One small training run, written once, for every way of spreading it over ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from pss_param.attaching import attach
from pss_param.detector import GradientNormRatio
from pss_param.guard import Guard

WIDTH, INNER = 10, 28
SPIKES = (4, 6, 9, 11)
STEPS = 14


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(7, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


NAMES = [f"blocks.{i}.{part}.weight" for i in range(2) for part in ("up", "down")]
PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def wrap(model: Net, stack: str) -> nn.Module:
    """Spread the model: the name says how, e.g. ``"fsdp bf16"`` or ``"tp fsdp"``."""
    words, kind = stack.split(), next(model.parameters()).device.type
    world = torch.distributed.get_world_size()
    dp = None
    if "tp" in words:
        shape, names = ((world,), ("tp",)) if words == ["tp"] else ((2, world // 2), ("dp", "tp"))
        mesh = init_device_mesh(kind, shape, mesh_dim_names=names)
        for block in model.blocks:
            parallelize_module(block, mesh["tp"], PLAN)
        dp = mesh["dp"] if "dp" in names else None
    if "hybrid" in words:
        dp = init_device_mesh(kind, (2, world // 2), mesh_dim_names=("replicas", "shards"))
    if "ddp" in words:
        return DistributedDataParallel(model)
    if "fsdp" in words:
        dp = init_device_mesh(kind, (world,)) if dp is None else dp
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if "bf16" in words else MixedPrecisionPolicy()
        options: dict[str, Any] = {"mesh": dp, "mp_policy": policy}
        for block in model.blocks:
            fully_shard(block, **options)
        fully_shard(model, **options)
    return model


def data_ranks(stack: str) -> tuple[int, int]:
    """How many shares the batch has, and which one is this rank's."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    if stack == "tp":
        return 1, 0
    return (2, rank // (world // 2)) if "tp" in stack.split() else (world, rank)


def loss_of(model: nn.Module, step: int, shares: int = 1, share: int = 0) -> Tensor:
    """The loss of one share of the batch. At a spike only the last share's gradient is large."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(16, 7, generator=generator), torch.randint(5, (16,), generator=generator)
    x[-4:] *= 1 + 40 * (step in SPIKES)
    rows, device = slice(share * 16 // shares, (share + 1) * 16 // shares), next(model.parameters()).device
    x, y = x.to(device), y.to(device)
    return nn.functional.cross_entropy(model(x[rows]).float(), y[rows])


@dataclasses.dataclass
class Run:
    model: nn.Module
    guard: Guard
    optimizer: torch.optim.Optimizer
    shares: tuple[int, int] = (1, 0)

    def go(self, first: int, last: int, between: Callable[[Run, int], None] = lambda run, step: None) -> list[Any]:
        events = []
        for step in range(first, last):
            self.optimizer.zero_grad()
            loss_of(self.model, step, *self.shares).backward()
            events.append(self.guard.step())
            self.optimizer.step()
            between(self, step)
        return events


def detector() -> GradientNormRatio:
    return GradientNormRatio(threshold=2.5, settle=3)


def start(stack: str = "", *, attach_first: bool = False, prepare: Callable[[nn.Module], None] = lambda model: None,
          device: str = "cpu", **options: Any) -> Run:  # fmt: skip
    """A fresh run on the stack of that name; without a name a plain one on the whole batch."""
    model, guard = net().to(device), None
    if attach_first:
        guard = attach(model, detector=detector(), **options)
    wrapped = wrap(model, stack) if stack else model
    prepare(model)
    guard = attach(wrapped, detector=detector(), **options) if guard is None else guard
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01)
    return Run(wrapped, guard, optimizer, data_ranks(stack) if stack else (1, 0))


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone().cpu()


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): whole(value) for name, value in model.state_dict().items()}
