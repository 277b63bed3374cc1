# SPDX-License-Identifier: Apache-2.0
"""What a guard communicates: scalars for the norm, nothing for a fold, thin blocks for directions; never a weight."""

from __future__ import annotations

import pytest
import torch
from parallel_runs import PLAN, loss_of, start
from ranks import Ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pss_param.attaching import attach

WIDTH, INNER = 256, 512


class Traffic(TorchDispatchMode):
    """Notes the elements of the largest tensor of every collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace in {"c10d", "_c10d_functional"} and "wait" not in func.__name__:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.sizes.append(max((tensor.numel() for tensor in tensors), default=0))
        return func(*args, **(kwargs or {}))


def traffic_of_a_step(stack: str) -> dict:
    """Elements per collective of the guard's own calls, around a trigger that a forward pass has read."""
    run = start(stack)
    run.go(0, 5)
    opened = run.guard.is_open
    loss_of(run.model, 5, *run.shares).backward()
    with Traffic() as norm:
        event = run.guard.step()  # folds, then asks for the norm
    run.guard.fold()
    for view in run.guard.views.values():
        view.open()
    loss_of(run.model, 6, *run.shares).backward()
    with Traffic() as fold:
        run.guard.fold()
    return {"open": opened, "norm": norm.sizes, "fold": fold.sizes, "event": str(event)}


@pytest.mark.parametrize("stack", ["ddp", "fsdp", "tp"])
def test_a_fold_communicates_nothing_and_a_step_only_scalars(two_ranks: Ranks, stack: str) -> None:
    _check(two_ranks(traffic_of_a_step, stack))


def test_a_fold_over_two_dimensions_communicates_nothing(four_ranks: Ranks) -> None:
    _check(four_ranks(traffic_of_a_step, "tp fsdp"))


def _check(by_rank: list[dict]) -> None:
    for outcome in by_rank:
        assert outcome["open"]
        assert outcome["fold"] == []
        assert max(outcome["norm"], default=0) <= 8, "a norm is a number a rank"
        assert outcome["event"] == by_rank[0]["event"]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(INNER, WIDTH, bias=False)
        with torch.no_grad():
            for layer in (self.up, self.down):  # three directions have taken over
                m, n = layer.weight.shape
                layer.weight.add_(torch.randn(m, 3) @ torch.randn(3, n), alpha=0.05)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


def traffic_of_directions(stack: str, edge: str) -> list[int]:
    """Elements per collective of a fold that nobody has read before: it has to find the directions on the shards."""
    model = Pair()
    mesh = init_device_mesh("cpu", (2,))
    if stack == "fsdp":
        fully_shard(model, mesh=mesh)
    else:
        parallelize_module(model, mesh, PLAN)
    guard = attach(model, targets="all", edge=edge)
    guard.step(1.0)
    for name, view in guard.views.items():
        view.open(tuple(level / 4 for level in guard.detector.levels(name)))  # heeded at the edge baseline only
    with Traffic() as traffic:
        guard.fold()
    return traffic.sizes


@pytest.mark.parametrize("edge", ["dominant", "baseline"])
@pytest.mark.parametrize("stack", ["fsdp", "tp"])
def test_directions_of_shards_cost_tall_and_skinny_blocks(two_ranks: Ranks, stack: str, edge: str) -> None:
    for sizes in two_ranks(traffic_of_directions, stack, edge):
        assert sizes, "this test no longer measures anything"
        assert max(sizes) <= 32 * INNER, "blocks of a few columns"
        assert max(sizes) <= WIDTH * INNER / 8
