# SPDX-License-Identifier: Apache-2.0
"""What an open gate shows and stores where weights are sharded, and what it costs to keep it open."""

from __future__ import annotations

import gc

import pytest
import torch
from parallel_runs import NAMES, loss_of, start, whole, whole_state
from ranks import Ranks
from torch.distributed.fsdp import fully_shard

from pss_param.attaching import attach
from pss_param.floor import StableRankFloor
from pss_param.guard import detach
from pss_param.policy import GuardPolicy


def until_open(stack: str) -> tuple:
    run = start(stack)
    run.go(0, 5)
    assert run.guard.is_open
    return run, dict(run.guard.views.items())


def stored(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(weight) for name, weight in model.named_parameters() if name in NAMES}


def saved_while_open(stack: str) -> dict:
    """The state saved at an open gate, then what the next step makes of the weights without an update."""
    run, _views = until_open(stack)
    raw = stored(run.model)
    saved = whole_state(run.model)
    loss_of(run.model, 5, *run.shares).backward()
    run.guard.fold()
    return {"raw": raw, "saved": saved, "folded": whole_state(run.model)}


@pytest.mark.parametrize("stack", ["fsdp", "tp"])
def test_a_checkpoint_of_an_open_gate_has_the_folded_bits(two_ranks: Ranks, stack: str) -> None:
    _check_saved(two_ranks(saved_while_open, stack))


def test_a_checkpoint_of_an_open_gate_over_two_dimensions(four_ranks: Ranks) -> None:
    _check_saved(four_ranks(saved_while_open, "tp fsdp"))


def _check_saved(by_rank: list[dict]) -> None:
    for outcome in by_rank:
        assert not any(torch.equal(outcome["raw"][name], outcome["saved"][name]) for name in NAMES)
        for name, value in outcome["saved"].items():
            assert torch.equal(outcome["folded"][name], value), name
            assert torch.equal(by_rank[0]["saved"][name], value), name


def moved_at_rest(stack: str) -> dict:
    """Everything in which FSDP2 reads ``module.weight`` itself, with the gate open."""
    run, _ = until_open(stack)
    parameters = {name: id(parameter) for name, parameter in run.model.named_parameters()}
    raw = stored(run.model)
    run.model.to(torch.float32)
    run.model.cpu()
    run.model(torch.ones(2, 7)).sum().backward()
    after = stored(run.model)
    untouched = [torch.equal(raw[name], after[name]) for name in NAMES]
    same = parameters == {name: id(parameter) for name, parameter in run.model.named_parameters()}
    state = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.model.load_state_dict(state)
    return {"untouched": untouched, "same": same, "open": run.guard.is_open, "next": len(run.go(5, 7))}


def test_fsdp_may_look_at_its_modules_while_gates_are_open(two_ranks: Ranks) -> None:
    for outcome in two_ranks(moved_at_rest, "fsdp"):
        assert outcome == {"untouched": [True] * len(NAMES), "same": True, "open": False, "next": 2}


def previewed(stack: str) -> dict:
    """A preview before the first forward pass, when FSDP2 has not even set itself up."""
    run = start(stack)
    x = torch.randn(3, 7)
    before = whole_state(run.model)
    with torch.no_grad(), run.guard.preview():
        shown = run.model(x)
    after = whole_state(run.model)
    with torch.no_grad():
        plain = run.model(x)
    return {"shown": shown, "plain": plain, "kept": all(torch.equal(before[name], after[name]) for name in before)}


@pytest.mark.parametrize("stack", ["ddp", "fsdp", "tp"])
def test_a_preview_leaves_nothing_behind(two_ranks: Ranks, stack: str) -> None:
    alone = start()
    torch.manual_seed(0)
    start()  # draws what a rank draws before its input
    x = torch.randn(3, 7)
    with torch.no_grad(), alone.guard.preview():
        truth = alone.model(x)
    for outcome in two_ranks(previewed, stack):
        assert outcome["kept"]
        assert not torch.allclose(outcome["shown"], outcome["plain"])
        torch.testing.assert_close(outcome["shown"], truth)


def detached_in_the_middle(stack: str) -> dict:
    run, _ = until_open(stack)
    names, classes = list(dict(run.model.named_parameters())), [type(m).__name__ for m in run.model.modules()]
    run.guard.detach()
    run.optimizer.zero_grad()
    loss_of(run.model, 5, *run.shares).backward()
    run.optimizer.step()
    guard = attach(run.model)
    detach(run.model)
    return {"names": names == list(dict(run.model.named_parameters())), "classes": classes,
            "left": [type(m).__name__ for m in run.model.modules() if "arametri" in type(m).__name__],
            "guards": len(guard.views)}  # fmt: skip


@pytest.mark.parametrize("stack", ["fsdp", "tp"])
def test_detaching_gives_the_model_back(two_ranks: Ranks, stack: str) -> None:
    for outcome in two_ranks(detached_in_the_middle, stack):
        assert outcome["names"]
        assert outcome["left"] == []
        assert outcome["guards"] == len(NAMES)


def floor_ranks(stack: str) -> dict:
    from parallel_runs import Run, data_ranks, net, wrap

    model = wrap(net(), stack)
    guard = attach(model, detector=StableRankFloor(period=2))
    run = Run(model, guard, torch.optim.SGD(model.parameters(), lr=0.01), data_ranks(stack))
    run.go(0, 1)
    baseline = guard.detector.baseline.clone()
    run.go(1, 3)
    with torch.no_grad():
        weight = {name.removeprefix("module."): weight for name, weight in model.named_parameters()}[NAMES[1]]
        weight.add_(10 * torch.linalg.vector_norm(whole(weight)) / weight.numel() ** 0.5)  # rank one, and large
    events = run.go(3, 8)
    return {"baseline": baseline, "smoothed": [event.smoothed for event in events]}


@pytest.mark.parametrize("stack", ["fsdp", "tp", "ddp"])
def test_the_stable_rank_floor_sees_through_shards(two_ranks: Ranks, stack: str) -> None:
    from parallel_runs import net

    alone = attach(net(), detector=StableRankFloor(period=2))
    alone.step(1.0)
    by_rank = two_ranks(floor_ranks, stack)
    for outcome in by_rank:
        torch.testing.assert_close(outcome["baseline"], alone.detector.baseline, rtol=1e-4, atol=0)
        assert outcome["smoothed"] == by_rank[0]["smoothed"]
        assert (NAMES[1],) in outcome["smoothed"]


def moments_after_a_fold(stack: str) -> dict:
    run = start(stack, policy=GuardPolicy(reset_moments=True, max_trigger_rate=1))
    run.optimizer = torch.optim.AdamW(run.model.parameters(), lr=0.01)
    opened = False
    for step in range(6):
        run.optimizer.zero_grad()
        loss_of(run.model, step, *run.shares).backward()
        if opened:
            break
        opened = run.guard.step(optimizer=run.optimizer).triggered
        run.optimizer.step()
    run.guard.step(optimizer=run.optimizer)
    names = {name.removeprefix("module."): weight for name, weight in run.model.named_parameters()}
    return {"opened": opened, "cleared": sorted(name for name, p in names.items() if p not in run.optimizer.state)}


@pytest.mark.parametrize("stack", ["ddp", "fsdp", "tp"])
def test_moments_of_smoothed_shards_are_reset(two_ranks: Ranks, stack: str) -> None:
    assert two_ranks(moments_after_a_fold, stack) == [{"opened": True, "cleared": sorted(NAMES)}] * 2


def folded_after_evaluation() -> dict:
    """After a forward pass alone the root's whole weights stay in their modules, where a fold must not go."""
    run = start("fsdp", targets="all")
    run.go(0, 5)
    with torch.no_grad():
        run.model(torch.ones(2, 7))
    kind = type(run.model.head._parameters["weight"].data).__name__
    shown = whole(run.model.head.weight)
    run.guard.fold()
    return {"kind": kind, "kept": torch.allclose(whole_state(run.model)["head.weight"], shown, atol=1e-6)}


def test_a_fold_reaches_the_shards_after_an_evaluation(two_ranks: Ranks) -> None:
    assert two_ranks(folded_after_evaluation) == [{"kind": "Tensor", "kept": True}] * 2


class Wide(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(256, 256, bias=False) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def peaks(edge: str) -> dict:
    """Bytes of a step over its start, as the profiler hears from the allocator: closed, open, open without recipes."""
    model = Wide()
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    guard = attach(model, targets="all", edge=edge)
    guard.step(1.0)
    guard.detector.members[1].level.mul_(0.8)  # so that both edges have something to take away
    x = torch.randn(4, 256)
    outcome = {"weight": 4 * 256 * 256}
    _bytes(model, x)
    outcome["closed"] = _bytes(model, x)
    with guard.preview():
        _bytes(model, x)  # the directions are computed here
        outcome["open"], grads = _bytes(model, x), _gradients(model, x)
        for view in guard.views.values():
            view.thin.remove()
        outcome["thick"] = _bytes(model, x)
        outcome["same"] = all(torch.equal(a, b) for a, b in zip(grads, _gradients(model, x), strict=True))
    return outcome


def _bytes(model: torch.nn.Module, x: torch.Tensor) -> tuple[int, int]:
    """Bytes held between forward and backward, and at the peak; the least of three steps, without what others left."""
    seen = [_bytes_once(model, x) for _ in range(3)]
    return min(held for held, _ in seen), min(peak for _, peak in seen)


def _bytes_once(model: torch.nn.Module, x: torch.Tensor) -> tuple[int, int]:
    gc.collect()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        loss = model(x).square().mean()
        with torch.profiler.record_function("between"):
            loss.backward()
    # Memory that comes and goes with gradients would hide the weights.
    model.zero_grad(set_to_none=False)
    events = sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    level = highest = held = 0
    for event in events:
        if event.name() == "between":
            held = level
        level += event.nbytes() if event.name() == "[memory]" else 0
        highest = max(highest, level)
    return held, highest


def _gradients(model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model(x).square().mean().backward()
    grads = [whole(parameter.grad) for parameter in model.parameters()]
    model.zero_grad(set_to_none=False)
    return grads


@pytest.mark.parametrize("edge", ["dominant", "baseline"])
def test_an_open_view_does_not_defeat_resharding(two_ranks: Ranks, edge: str) -> None:
    for outcome in two_ranks(peaks, edge):
        print(outcome)
        (held, peak), (thick_held, thick_peak) = (
            [(now - before) / outcome["weight"] for now, before in zip(outcome[how], outcome["closed"], strict=True)]
            for how in ("open", "thick")
        )
        assert thick_held > 5, "without recipes all eight weights stay, or this test no longer measures anything"
        assert thick_peak > peak + 2
        assert held < 1
        assert peak < 3, "an open view may hold the weight that it works on, and no more"
        assert outcome["same"]
