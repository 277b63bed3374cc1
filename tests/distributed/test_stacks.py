# SPDX-License-Identifier: Apache-2.0
"""Guarded training on every stack, on real processes, against the same training on one."""

from __future__ import annotations

import pytest
import torch
from parallel_runs import STEPS, start, whole_state
from ranks import Ranks

TWO = ["ddp", "fsdp", "tp", "fsdp bf16"]
FOUR = ["tp fsdp", "fsdp hybrid", "fsdp", "tp"]


def trained(stack: str, attach_first: bool, device: str = "cpu") -> dict:
    run = start(stack, attach_first=attach_first, device=device)
    events = run.go(0, STEPS)
    run.guard.fold()
    return {"events": [str(event) for event in events], "norms": [event.norm for event in events],
            "fired": [event.step for event in events if event.triggered], "state": whole_state(run.model)}  # fmt: skip


def plain() -> dict:
    run = start()
    events = run.go(0, STEPS)
    run.guard.fold()
    return {"norms": [event.norm for event in events], "fired": [event.step for event in events if event.triggered],
            "state": whole_state(run.model)}  # fmt: skip


def _check(by_rank: list[dict], stack: str) -> None:
    truth = plain()
    assert len(truth["fired"]) >= 3, "the reference run must smooth several times"
    coarse = "bf16" in stack
    for outcome in by_rank:
        assert outcome["events"] == by_rank[0]["events"], "ranks decide differently"
        assert outcome["fired"] == truth["fired"]
        assert outcome["norms"] == pytest.approx(truth["norms"], rel=5e-2 if coarse else 1e-3)
        for name, weight in truth["state"].items():
            assert torch.equal(outcome["state"][name], by_rank[0]["state"][name]), f"{name} differs between ranks"
            tolerance = {"rtol": 0.05, "atol": 0.03} if coarse else {"rtol": 1e-3, "atol": 1e-4}
            torch.testing.assert_close(outcome["state"][name], weight, **tolerance)


@pytest.mark.parametrize("stack", TWO)
@pytest.mark.parametrize("attach_first", [False, True])
def test_two_ranks_train_like_one(two_ranks: Ranks, stack: str, attach_first: bool) -> None:
    _check(two_ranks(trained, stack, attach_first), stack)


@pytest.mark.parametrize(("stack", "attach_first"), [*((stack, False) for stack in FOUR), ("tp fsdp", True)])
def test_four_ranks_train_like_one(four_ranks: Ranks, stack: str, attach_first: bool) -> None:
    _check(four_ranks(trained, stack, attach_first), stack)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each of two ranks")
@pytest.mark.parametrize("stack", TWO)
@pytest.mark.parametrize("attach_first", [False, True])
def test_two_ranks_train_like_one_through_nccl(two_ranks: Ranks, stack: str, attach_first: bool) -> None:
    _check(two_ranks(trained, stack, attach_first, "cuda"), stack)
