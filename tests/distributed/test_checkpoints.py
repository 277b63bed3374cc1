# SPDX-License-Identifier: Apache-2.0
"""Distributed checkpoints: attached and plain runs exchange them, on more and on fewer ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from parallel_runs import STEPS, Run, data_ranks, loss_of, net, start, whole, whole_state, wrap
from ranks import Ranks
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful

_SOME = [
    (True, True),
    pytest.param(True, False, marks=pytest.mark.slow),
    pytest.param(False, True, marks=pytest.mark.slow),
]

FIRST = 7  # the gate that opened at step 6 (from 0) is open when the checkpoint is written


def plain_run(stack: str) -> Run:
    """The same model and optimizer without a guard."""
    model = wrap(net(), stack) if stack else net()
    shares = data_ranks(stack) if stack else (1, 0)
    return Run(model, None, torch.optim.AdamW(model.parameters(), lr=0.01), shares)  # type: ignore[arg-type]


def guarded_run(stack: str) -> Run:
    run = start(stack)
    run.optimizer = torch.optim.AdamW(run.model.parameters(), lr=0.01)
    return run


def _step(run: Run, step: int) -> None:
    run.optimizer.zero_grad()
    loss_of(run.model, step, *run.shares).backward()
    if run.guard is not None:
        run.guard.step()
    run.optimizer.step()


def _contents(run: Run, model_state: dict, optimizer_state: dict, with_guard: bool) -> dict:
    extra = {"guard": run.guard} if with_guard else {}
    return {"model": model_state, "optimizer": optimizer_state, **extra}


def save(stack: str, attached: bool, folder: str) -> dict:
    run = (guarded_run if attached else plain_run)(stack)
    for step in range(FIRST):
        _step(run, step)
    opened = attached and run.guard.is_open
    content = _contents(
        run, get_model_state_dict(run.model), get_optimizer_state_dict(run.model, run.optimizer), attached
    )
    dcp.save(content, checkpoint_id=folder)
    saved = _seen(run)
    for step in range(FIRST, STEPS):
        _step(run, step)
    if attached:
        run.guard.fold()
    return {"saved": saved, "open": opened, "final": _seen(run)}


def load(stack: str, attached: bool, with_guard: bool, folder: str) -> dict:
    run = (guarded_run if attached else plain_run)(stack)
    _step(run, 100)  # the optimizer has a state of its own to be replaced
    model_state, optimizer_state = get_model_state_dict(run.model), get_optimizer_state_dict(run.model, run.optimizer)
    dcp.load(_contents(run, model_state, optimizer_state, with_guard), checkpoint_id=folder)
    set_model_state_dict(run.model, model_state)
    set_optimizer_state_dict(run.model, run.optimizer, optimizer_state)
    loaded = _seen(run)
    for step in range(FIRST, STEPS):
        _step(run, step)
    if attached:
        run.guard.fold()
    return {"loaded": loaded, "final": _seen(run)}


def _seen(run: Run) -> dict:
    names = {id(p): name.removeprefix("module.") for name, p in run.model.named_parameters()}
    moments = {
        f"{names[id(p)]}.{key}": whole(torch.as_tensor(value))
        for p, state in run.optimizer.state.items()
        for key, value in state.items()
    }
    guard = None
    if run.guard is not None:
        state = run.guard.state_dict()
        guard = (state["counters"], state["openings"], {k: float(v) for k, v in state["detector"].items()})
    return {"weights": whole_state(run.model), "moments": moments, "guard": guard}


def _same(ours: dict, theirs: dict, exact: bool = True) -> None:
    for part in ("weights", "moments"):
        assert ours[part].keys() == theirs[part].keys()
        for name, value in ours[part].items():
            close = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-3, "atol": 1e-4}
            torch.testing.assert_close(value, theirs[part][name], **close)


@pytest.mark.parametrize("stack", ["fsdp", "ddp"])
@pytest.mark.parametrize("loads_attached", [False, True])
@pytest.mark.parametrize("saves_attached", [False, True])
def test_attached_and_plain_runs_exchange_checkpoints(
    two_ranks: Ranks, tmp_path: Path, stack: str, saves_attached: bool, loads_attached: bool
) -> None:
    _exchange(two_ranks, tmp_path, stack, saves_attached, loads_attached)


@pytest.mark.parametrize(("saves_attached", "loads_attached"), _SOME)
def test_over_two_dimensions(four_ranks: Ranks, tmp_path: Path, saves_attached: bool, loads_attached: bool) -> None:
    _exchange(four_ranks, tmp_path, "tp fsdp", saves_attached, loads_attached)


def _exchange(ranks: Ranks, tmp_path: Path, stack: str, saves_attached: bool, loads_attached: bool) -> None:
    saved = ranks(save, stack, saves_attached, str(tmp_path))
    both = saves_attached and loads_attached
    loaded = ranks(load, stack, loads_attached, both, str(tmp_path))
    for before, after in zip(saved, loaded, strict=True):
        assert before["open"] == saves_attached
        _same(after["loaded"], before["saved"])
        if saves_attached == loads_attached:
            _same(after["final"], before["final"])
            assert after["final"]["guard"] == before["final"]["guard"]


@pytest.mark.parametrize(("saver", "loader"), [(1, 2), (2, 1), (2, 4), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_checkpoints_move_to_another_number_of_ranks(
    two_ranks: Ranks, four_ranks: Ranks, tmp_path: Path, saver: int, loader: int
) -> None:
    pools = {2: two_ranks, 4: four_ranks}
    saved = pools[saver](save, "fsdp", True, str(tmp_path)) if saver > 1 else [_alone(save, "", True, str(tmp_path))]
    arguments = (True, True, str(tmp_path))
    loaded = pools[loader](load, "fsdp", *arguments) if loader > 1 else [_alone(load, "", *arguments)]
    for after in loaded:
        _same(after["loaded"], saved[0]["saved"])
        assert after["loaded"]["guard"] == saved[0]["saved"]["guard"]
        _same(after["final"], saved[0]["final"], exact=False)


def _alone(job, *args):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return job(*args)
    finally:
        dist.destroy_process_group()


def test_a_guard_is_stateful() -> None:
    assert isinstance(start().guard, Stateful)
