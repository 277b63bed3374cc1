# SPDX-License-Identifier: Apache-2.0
"""On every stack a real run on real processes dies without the guard and lives with it, the same on every rank."""

from __future__ import annotations

import pytest
import torch
from loops import ALIVE, DEAD, on_ranks
from parallel_runs import data_ranks, whole_state, wrap
from ranks import Ranks
from torch import nn

import pss_param.compiled as tracing

slow = pytest.mark.slow
TWO = [
    "ddp",
    *(pytest.param(stack, marks=slow) for stack in ("fsdp", "fsdp bf16", "tp", "fsdp compiled")),
]


def train(stack: str, guarded: bool) -> dict:
    words = stack.removesuffix(" compiled")

    def spread(model: nn.Module) -> nn.Module:
        if "compiled" in stack:
            for block in model.blocks:
                block.compile(backend="inductor")
        return wrap(model, words)

    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # instead of going on without a compiler
        loss, guard, model = on_ranks(guarded, data_ranks(words), spread)
    openings = 0
    if guard is not None:
        guard.fold()
        openings = sum(view.openings for view in guard.views.values())
    torch._dynamo.reset()
    tracing._traced.clear()  # the ranks live on, and other tests train such models without a compiler
    return {"loss": loss, "openings": openings, "state": whole_state(model)}


def _check(ranks: Ranks, stack: str) -> None:
    dead = ranks(train, stack, False)
    alive = ranks(train, stack, True)
    assert sum(one["loss"] for one in dead) / len(dead) > DEAD
    assert sum(one["loss"] for one in alive) / len(alive) < ALIVE
    for one in alive:
        assert one["openings"] == alive[0]["openings"] >= 100, "through many openings"
        for name, value in alive[0]["state"].items():
            assert torch.equal(one["state"][name], value), f"{name} differs between ranks"


@pytest.mark.parametrize("stack", TWO)
def test_two_ranks_die_without_the_guard_and_live_with_it(two_ranks: Ranks, stack: str) -> None:
    _check(two_ranks, stack)


@pytest.mark.slow
def test_two_dimensions_die_without_the_guard_and_live_with_it(four_ranks: Ranks) -> None:
    _check(four_ranks, "tp fsdp")
