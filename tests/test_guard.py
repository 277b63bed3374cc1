# SPDX-License-Identifier: Apache-2.0
import copy
import io
import logging
import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrize

from pss_param import compiled
from pss_param.attaching import attach
from pss_param.detector import AnyOf, Detector, GradientNormRatio, Verdict
from pss_param.errors import ArgumentError, NonFiniteError, StateError
from pss_param.factors import factors_of
from pss_param.floor import StableRankFloor
from pss_param.guard import detach
from pss_param.policy import GuardPolicy
from pss_param.smoothing import Smoothing
from pss_param.spectrum import spectral_norm
from pss_param.targets import TargetRules


class OnSteps(Detector):
    """Fires at given steps; a stand-in for a spike that does not depend on the numbers."""

    def __init__(self, *steps, names=None, limit=math.inf):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.steps, self.names, self.limit = steps, names, limit

    def judge(self, norm, seen):
        self.count.add_(1)
        if int(self.count) in self.steps:
            return Verdict(True, self.names, 3.0, "asked to", self.limit)
        return Verdict(ratio=1.0)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, width=8, tied=False):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


NAMES = [f"blocks.{i}.{part}.weight" for i in range(2) for part in ("up", "down")]


def net(seed=0, **options):
    torch.manual_seed(seed)
    return Net(**options)


def loss_of(model, step=0):
    tokens = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())


def train(model, guard, optimizer, steps, start=0):
    losses = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        guard.step()
        optimizer.step()
        losses.append(loss.item())
    return losses


def snapshot(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one, two):
    return list(one) == list(two) and all(torch.equal(one[key], two[key]) for key in one)


def test_attach_and_detach_leave_no_trace():
    model = net()
    before, ids = snapshot(model), [(name, id(value)) for name, value in model.named_parameters()]
    classes = [type(module) for module in model.modules()]
    guard = attach(model)
    assert list(guard.views) == NAMES
    assert [(name, id(value)) for name, value in model.named_parameters()] == ids
    assert same(before, snapshot(model))
    assert parametrize.is_parametrized(model.blocks[0].up, "weight")
    assert model.blocks[0].up.weight is dict(model.named_parameters())[NAMES[0]]
    guard.detach()
    assert [type(module) for module in model.modules()] == classes
    assert [(name, id(value)) for name, value in model.named_parameters()] == ids
    assert same(before, snapshot(model))


def test_a_quiet_guard_changes_no_bit_of_a_training_run():
    plain, guarded = net(), net()
    guard = attach(guarded, detector=OnSteps())
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (plain, guarded)]
    for step in range(5):
        for model, optimizer in zip((plain, guarded), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            if model is guarded:
                guard.step()
            optimizer.step()
    assert same(snapshot(plain), snapshot(guarded))


def test_the_life_of_a_trigger():
    model = net()
    guard = attach(model, detector=OnSteps(2), policy=GuardPolicy(prepare="lazy"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, guard, optimizer, 1)
    loss_of(model, 1).backward()
    event = guard.step()
    assert (event.triggered, event.smoothed, event.skip) == (True, tuple(NAMES), False)
    assert guard.is_open
    assert all(view.factors is None for view in guard.views.values())  # no linear algebra yet
    optimizer.step()
    stored = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    shown = {name: model.get_submodule(name[:-7]).weight.detach().clone() for name in NAMES}
    assert all(torch.equal(stored[name], value) for name, value in model.named_parameters())
    event = guard.step()
    assert not event.triggered
    assert not guard.is_open
    for name, value in model.named_parameters():
        assert torch.equal(value, shown.get(name, stored[name]))
    assert all(torch.linalg.matrix_norm(shown[n], 2) < torch.linalg.matrix_norm(stored[n], 2) for n in NAMES)


def test_consecutive_triggers_fold_and_open_again():
    model = net()
    guard = attach(model, detector=OnSteps(2, 3))
    train(model, guard, torch.optim.SGD(model.parameters(), lr=0.1), 3)
    assert guard.triggers == 2
    assert [view.openings for view in guard.views.values()] == [1] * 4
    assert guard.is_open


def test_only_the_named_weights_are_smoothed():
    model = net()
    guard = attach(model, detector=OnSteps(1, names=(NAMES[1],)))
    loss_of(model).backward()
    assert guard.step().smoothed == (NAMES[1],)
    assert [name for name, view in guard.views.items() if view.is_open] == [NAMES[1]]


def test_fold_discard_preview():
    model = net()
    guard = attach(model, detector=OnSteps(1))
    before = snapshot(model)
    with torch.no_grad(), guard.preview():
        shown = snapshot(model)
        assert guard.is_open
        with pytest.raises(StateError, match="leave the preview"):
            guard.step(1.0)
    assert not guard.is_open
    assert same(before, snapshot(model))
    assert not same(before, shown)
    guard.step(1.0)
    with torch.no_grad():
        assert same(shown, snapshot(model))
    guard.discard()
    assert same(before, snapshot(model))
    guard.views[NAMES[0]].open()
    opened = snapshot(model)
    guard.fold()
    assert same(opened, snapshot(model))
    assert not guard.is_open


def test_preview_keeps_a_pending_smoothing_and_refuses_a_pending_backward():
    model = net()
    guard = attach(model, detector=OnSteps(1, names=(NAMES[0],)))
    guard.step(1.0)
    with guard.preview():
        assert all(view.is_open for view in guard.views.values())
    assert [name for name, view in guard.views.items() if view.is_open] == [NAMES[0]]
    with pytest.raises(StateError, match="no_grad"), guard.preview():
        loss = loss_of(model)
    assert loss.requires_grad
    with pytest.raises(RuntimeError, match="mine"), guard.preview():
        raise RuntimeError("mine")
    assert [name for name, view in guard.views.items() if view.is_open] == [NAMES[0]]


def test_detach_while_open_folds_and_ends_the_guard():
    model = net()
    guard = attach(model, detector=OnSteps(1))
    guard.step(1.0)
    shown = snapshot(model)
    guard.detach()
    assert same(shown, snapshot(model))
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    guard.detach()
    for call in (guard.fold, guard.discard, guard.step, guard.__enter__):
        with pytest.raises(StateError, match="detached guard"):
            call()
    with attach(model) as again:
        assert "closed" in repr(again)
    assert "detached" in repr(again)


def test_attached_is_invisible_in_checkpoints_both_ways():
    model, plain = net(), net(seed=1)
    guard = attach(model, detector=OnSteps(1))
    guard.step(1.0)
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(loss_of(plain), loss_of(model))
    model.load_state_dict(net(seed=2).state_dict(), strict=True)
    assert not guard.is_open
    assert same(snapshot(model), snapshot(net(seed=2)))
    model.load_state_dict(net(seed=3).state_dict(), strict=True, assign=True)
    assert same(snapshot(model), snapshot(net(seed=3)))
    assert model.blocks[0].up.weight is dict(model.named_parameters())[NAMES[0]]


@pytest.mark.parametrize("stop", [3, 4, 5, 6])
def test_resumption_is_bit_exact_at_any_step_open_gate_included(stop):
    def build():
        model = net()
        detector = AnyOf(OnSteps(4, 6, 9), GradientNormRatio(settle=2), StableRankFloor(period=2))
        return model, detector, GuardPolicy(cooldown=1, max_trigger_rate=1)

    def start():
        model, detector, policy = build()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
        return model, attach(model, detector=detector, policy=policy), optimizer

    model, guard, optimizer = start()
    train(model, guard, optimizer, stop)
    was_open = guard.is_open
    file = io.BytesIO()
    torch.save([model.state_dict(), guard.state_dict(), optimizer.state_dict()], file)
    expected = train(model, guard, optimizer, 6, start=stop)

    resumed, second, other = start()
    train(resumed, second, other, 2)  # a run that had gone elsewhere
    file.seek(0)
    for part, state in zip((resumed, second, other), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert train(resumed, second, other, 6, start=stop) == expected
    assert same(snapshot(model), snapshot(resumed))
    assert (guard.steps, guard.triggers) == (second.steps, second.triggers)
    assert guard.triggers >= 2
    assert was_open or stop not in {4, 6}


def test_guard_state_of_other_weights_is_refused():
    guard = attach(net())
    other = attach(net(), targets="all")
    with pytest.raises(ArgumentError, match="different weights"):
        guard.load_state_dict(other.state_dict())
    with pytest.raises(ArgumentError, match="missing"):
        guard.load_state_dict({})


def test_deepcopy_of_an_attached_model_is_independent():
    model = net()
    guard = attach(model, detector=OnSteps(1))
    guard.step(1.0)
    twin = copy.deepcopy(model)
    shown = snapshot(model)
    guard.discard()
    assert same(shown, snapshot(twin))
    detach(twin)
    assert same(shown, snapshot(twin))
    assert type(twin.blocks[0].up) is nn.Linear
    both, pair = copy.deepcopy((model, guard))
    pair.views[NAMES[0]].open()
    assert both.blocks[0].up.weight is not both.blocks[0].up._parameters["weight"]
    pair.detach()
    assert not guard.is_open
    assert parametrize.is_parametrized(model.blocks[0].up, "weight")


def test_tied_weights_are_skipped_by_default_and_shared_on_request(caplog):
    with caplog.at_level(logging.INFO, logger="pss_param"):
        guard = attach(net(tied=True), targets="all")
    assert list(guard.views) == NAMES
    assert any("embed.weight" in message and "tied" in message for message in caplog.messages)
    model = net(tied=True)
    guard = attach(model, TargetRules(preset="all", tied="share"), detector=OnSteps(1))
    assert len(guard.views) == 5
    assert model.embed.parametrizations.weight[0] is model.head.parametrizations.weight[0]
    guard.step(1.0)
    shown = model.embed.weight.detach().clone()
    assert torch.equal(shown, model.head.weight)
    guard.fold()
    assert model.embed.weight is model.head.weight
    assert torch.equal(model.head.weight, shown)  # folded once
    guard.detach()
    assert model.embed.weight is model.head.weight


def test_nonfinite_gradients_are_dropped_counted_and_finally_an_error(caplog):
    model = net()
    detector = GradientNormRatio(settle=1)
    guard = attach(model, detector=detector, policy=GuardPolicy(max_nonfinite=3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, guard, optimizer, 1)
    before, average = snapshot(model), float(detector.average)
    for count in (1, 2):
        (loss_of(model) * math.nan).backward()
        event = guard.step()
        optimizer.step()
        assert event.skip
        assert f"{count} in a row" in str(event)
    assert same(before, snapshot(model))
    assert float(detector.average) == average
    train(model, guard, optimizer, 1)
    assert guard.nonfinite == 0
    guard.step(math.inf)
    guard.step(torch.tensor(math.nan))
    with pytest.raises(NonFiniteError, match="pss-repair CHECKPOINT"):
        guard.step(math.nan)
    assert any("gradients dropped" in message for message in caplog.messages)


@pytest.mark.parametrize("policy", [GuardPolicy(), GuardPolicy(deferred=True)])
def test_a_skipped_step_of_a_guard_on_a_part_leaves_the_rest_alone_too_if_the_optimizer_is_given(policy):
    model = net()
    guard = attach(model.blocks, policy=policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = snapshot(model)
    (loss_of(model) * math.nan).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    event = guard.step(norm, optimizer=optimizer)
    assert event.skip != policy.deferred
    optimizer.step()
    assert same(before, snapshot(model))


def test_a_dropped_spike_of_a_guard_on_a_part_is_dropped_for_the_whole_optimizer():
    model = net()
    guard = attach(model.blocks, detector=OnSteps(1), policy=GuardPolicy(on_trigger="smooth_and_skip"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model).backward()
    assert guard.step(optimizer=optimizer).skip
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_scaler_that_has_unscaled_survives_a_skipped_step():
    model = net()
    guard = attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    before = snapshot(model)
    scaler.scale(loss_of(model) * math.inf).backward()
    scaler.unscale_(optimizer)
    assert guard.step().skip
    scaler.step(optimizer)
    scaler.update()
    assert same(before, snapshot(model))
    assert scaler.get_scale() < 2.0**16


def test_an_orthogonal_weight_of_before_is_left_alone_and_trains():
    model = net()
    nn.utils.parametrizations.orthogonal(model.blocks[0].up)
    guard = attach(model)
    assert sorted(guard.views) == sorted(name for name in NAMES if name != "blocks.0.up.weight")
    train(model, guard, torch.optim.SGD(model.parameters(), lr=0.1), 2)
    weight = model.blocks[0].up.weight.detach()
    torch.testing.assert_close(weight.mT @ weight, torch.eye(8), atol=1e-5, rtol=0)


def test_a_whole_module_is_saved_after_detach(tmp_path):
    model = net()
    guard = attach(model)
    with pytest.raises(RuntimeError, match="state_dict"):
        torch.save(model, tmp_path / "whole.pt")
    guard.detach()
    torch.save(model, tmp_path / "whole.pt")


@pytest.mark.parametrize("targets", ["linear", "all"])
@pytest.mark.parametrize("choice", ["smooth", "smooth_and_clip"])
def test_sparse_gradients_count_as_the_dense_ones_that_they_stand_for(targets, choice):
    seen = []
    for sparse in (False, True):
        model = net()
        model.embed.sparse = sparse
        guard = attach(model, targets, detector=OnSteps(2, limit=0.01), policy=GuardPolicy(on_trigger=choice))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        events = []
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            assert model.embed.parametrizations if targets == "all" else model.embed.weight.grad.is_sparse == sparse
            events.append(guard.step())
            optimizer.step()
        seen.append(([event.norm for event in events], snapshot(model)))
    assert seen[0][0] == pytest.approx(seen[1][0], rel=1e-6)
    torch.testing.assert_close(seen[0][1], seen[1][1])


def test_sparse_gradients_that_are_not_finite_become_zeros_in_a_deferred_step():
    model = net()
    model.embed.sparse = True
    guard = attach(model, policy=GuardPolicy(deferred=True))
    (loss_of(model) * math.nan).backward()
    guard.step()
    assert model.embed.weight.grad.is_sparse
    assert not model.embed.weight.grad.to_dense().any()


def test_on_trigger_clip_and_skip():
    for choice in ("smooth", "smooth_and_clip", "smooth_and_skip"):
        model = net()
        guard = attach(model, detector=OnSteps(1, limit=0.01), policy=GuardPolicy(on_trigger=choice))
        loss_of(model).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        event = guard.step()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert event.skip == (choice == "smooth_and_skip") == (not grads)
        if grads:
            expected = 0.01 if choice == "smooth_and_clip" else norm.item()
            assert torch.nn.utils.get_total_norm(grads).item() == pytest.approx(expected, rel=1e-5)
        assert event.norm == pytest.approx(norm.item())


def test_clipping_looks_at_the_gradient_as_it_is_now():
    model = net()
    guard = attach(model, detector=OnSteps(1, limit=0.01), policy=GuardPolicy(on_trigger="smooth_and_clip"))
    loss_of(model).backward()
    before = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.02)
    guard.step(before)  # clipped to 0.02 already; the guard's limit is 0.01, whatever the norm once was
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert torch.nn.utils.get_total_norm(grads).item() == pytest.approx(0.01, rel=1e-4)


def test_cooldown_holds_back_and_says_so():
    model = net()
    guard = attach(model, detector=OnSteps(*range(1, 9)), policy=GuardPolicy(cooldown=3))
    events = [guard.step(1.0) for _ in range(8)]
    assert [event.triggered for event in events] == [True, False, False, False, True, False, False, False]
    assert "cooldown" in str(events[1])


def test_too_many_triggers_are_warned_of_once(caplog):
    guard = attach(net(), detector=OnSteps(*range(1, 300, 20)))
    for _ in range(200):
        guard.step(1.0)
    assert sum("more than 1 %" in message for message in caplog.messages) == 1


def test_reset_moments_clears_the_smoothed_weights_only():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    guard = attach(model, detector=OnSteps(3, names=(NAMES[0],)), policy=GuardPolicy(reset_moments=True))
    with pytest.raises(ArgumentError, match="optimizer=optimizer"):
        guard.step(1.0)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        guard.step(optimizer=optimizer)
        optimizer.step()
    taken = {name: int(optimizer.state[value]["step"]) for name, value in model.named_parameters()}
    assert taken.pop(NAMES[0]) == 1
    assert set(taken.values()) == {4}


@pytest.mark.parametrize("kernels", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_reset_moments_of_sgd_starts_the_momentum_again_whatever_the_kernels(kernels):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, **kernels)
    guard = attach(model, detector=OnSteps(3, names=(NAMES[0],)), policy=GuardPolicy(reset_moments=True))
    weights = dict(model.named_parameters())
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        guard.step(optimizer=optimizer)
        optimizer.step()
    remembered = {name: optimizer.state[value]["momentum_buffer"] for name, value in weights.items()}
    torch.testing.assert_close(remembered.pop(NAMES[0]), weights[NAMES[0]].grad)
    assert not any(torch.equal(value, weights[name].grad) for name, value in remembered.items())


def test_a_spike_is_caught_by_the_default_detector():
    model = net()
    guard = attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    train(model, guard, optimizer, 15)
    assert guard.triggers == 0
    (5 * loss_of(model, 16)).backward()
    event = guard.step()
    assert event.triggered
    assert event.ratio > 2.5
    assert "smoothing 4 weights" in str(event)


def test_the_stable_rank_floor_runs_under_the_guard():
    model = net(width=16)
    guard = attach(model, detector=StableRankFloor(period=1, fraction=0.5))
    assert not guard.step(1.0).triggered
    with torch.no_grad():
        model.blocks[1].down.weight.add_(torch.outer(torch.randn(16), torch.randn(32)) / 4)
    fired = [event for event in (guard.step(1.0) for _ in range(6)) if event.triggered]
    assert fired
    assert all(event.smoothed == (NAMES[3],) for event in fired)


def test_misuse_is_refused_in_words():
    model = net()
    guard = attach(model)
    with pytest.raises(StateError, match="guarded already"):
        attach(model)
    with pytest.raises(StateError, match="no parameter has a gradient"):
        guard.step()
    output = loss_of(model)
    output.register_hook(lambda gradient: guard.step(1.0))
    with pytest.raises(StateError, match="while a backward pass runs"):
        output.backward()
    for bad in ({"on_trigger": "explode"}, {"cooldown": -1}, {"max_trigger_rate": 0}, {"max_nonfinite": 0}):
        with pytest.raises(ArgumentError, match="got"):
            GuardPolicy(**bad)
    with pytest.raises(ArgumentError, match="edge is part of"):
        attach(net(), smoothing=Smoothing(), edge="bulk")
    frozen = net().requires_grad_(False)
    with pytest.raises(ArgumentError):
        attach(frozen)
    assert not any(parametrize.is_parametrized(module) for module in frozen.modules())


def test_a_spiking_norm_in_step_leaves_the_guard_usable_after_an_error():
    model = net()
    guard = attach(model, detector=OnSteps(1))
    guard.step(1.0)
    with pytest.raises(StateError, match="no parameter has a gradient"):
        guard.step()
    assert guard.is_open  # nothing was folded, nothing was counted
    assert guard.steps == 1


@pytest.mark.parametrize("training", [True, False])
def test_a_transformer_encoder_reads_its_fused_weights_through_the_views(training):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).train(training)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        plain = model(x)
    guard = attach(model, detector=OnSteps(1))
    assert sum(name.endswith("in_proj_weight") for name in guard.views) == 2
    with torch.no_grad():
        assert torch.equal(model(x), plain)  # in evaluation this is the fused fast path
    guard.step(1.0)
    # Without gradients matmul picks its kernel by whether the weight is a Parameter, and kernels differ in last bits.
    with torch.set_grad_enabled(training):
        shown = model(x)
    model.zero_grad()
    shown.sum().backward() if training else None
    guard.fold()
    with torch.set_grad_enabled(training):
        folded = model(x)
    assert torch.equal(shown, folded)
    assert not torch.allclose(shown, plain, atol=1e-3)
    guard.views[next(iter(guard.views))].open()
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_autocast_training_reads_the_folded_weight():
    model = net()
    guard = attach(model, detector=OnSteps(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_of(model).backward()
        guard.step()
        shown = loss_of(model).detach()
        guard.fold()
        assert torch.equal(loss_of(model).detach(), shown)


def test_compiled_without_graph_breaks_and_two_graphs():
    torch._dynamo.reset()
    model = net()
    guard = attach(model, detector=OnSteps(2, 4, 6), policy=GuardPolicy(max_trigger_rate=1))
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    twin, second = net(), None
    second = attach(twin, detector=OnSteps(2, 4, 6), policy=GuardPolicy(prepare="eager", max_trigger_rate=1))
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.05) for each in (model, twin)]
    for step in range(8):
        for run, keeper, optimizer in zip((compiled, twin), (guard, second), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(run, step).backward()
            keeper.step()
            optimizer.step()
    assert counter.frame_count == 2
    assert guard.triggers == 3
    assert same(snapshot(model), snapshot(twin))


def test_compiled_fused_weights_show_what_the_fold_stores_in_two_graphs(monkeypatch):
    monkeypatch.setattr("einops._backends._type2backend", {})  # as in a fresh process
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)
    guard = attach(model, detector=OnSteps(1, 2, 3))
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(2, 5, 16)
    plain = compiled(x).detach()
    guard.step(1.0)
    shown = compiled(x).detach()
    guard.fold()
    assert torch.equal(compiled(x).detach(), shown)
    assert not torch.allclose(plain, shown, atol=1e-3)
    for _ in range(2):
        guard.step(1.0)
        compiled(x)
        guard.fold()
    assert guard.triggers == 3
    assert counter.frame_count == 2


def test_a_compiled_program_that_was_not_announced_says_what_to_do():
    torch._dynamo.reset()
    model = net()
    guard = attach(model, detector=OnSteps(1), policy=GuardPolicy(prepare="lazy"))
    compiled = torch.compile(model, fullgraph=True, backend=CompileCounter())
    guard.step(1.0)
    with pytest.raises(Exception, match="prepare='eager'"):
        loss_of(compiled)


def fires_eagerly(model, guard, run):
    """Whether the directions exist right after the trigger."""
    loss_of(run).backward()
    assert guard.step().triggered
    made = [view.factors is not None for view in guard.views.values()]
    guard.discard()
    model.zero_grad()
    assert len(set(made)) == 1
    return made[0]


class Bystander(Net):
    """A model that nothing compiled reads."""


@pytest.mark.parametrize("how", ["wrapper", "function", "in place", "one layer"])
def test_directions_come_early_where_compiled_programs_read_such_a_model_and_nowhere_else(how, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "_traced", set())
    model, other = net(), Bystander()
    guard, bystander = (attach(each, detector=OnSteps(1, 2)) for each in (model, other))
    run = model
    if how == "wrapper":
        run = torch.compile(model, fullgraph=True, backend=CompileCounter())
    elif how == "function":
        run = torch.compile(lambda tokens: model(tokens), fullgraph=True, backend=CompileCounter())
    else:
        (model if how == "in place" else model.blocks[0]).compile(fullgraph=True, backend=CompileCounter())
    assert fires_eagerly(model, guard, run)
    assert not fires_eagerly(other, bystander, other), "what else the process has compiled must not matter"
    assert list(attach(net()).state_dict()["counters"]) == [*("steps", "triggers", "nonfinite", "resting"), "compiled"]


def test_the_models_of_a_sweep_share_one_graph_though_each_has_a_guard_of_its_own():
    torch._dynamo.reset()
    counter = CompileCounter()
    forward = torch.compile(lambda model, tokens: model(tokens), fullgraph=True, backend=counter)
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    for seed in range(12):  # more than the compiler puts up with
        model = net(seed)
        guard = attach(model)
        forward(model, tokens)
        guard.detach()
        attach(model)
        forward(model, tokens)
    assert counter.frame_count == 1


def test_a_resumed_run_knows_that_its_model_was_compiled(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "_traced", set())
    model, twin = net(), Bystander()
    guard, second = (attach(each, detector=OnSteps(1)) for each in (model, twin))
    loss_of(torch.compile(model, backend=CompileCounter()))
    old = second.state_dict()
    second.load_state_dict(guard.state_dict())
    assert fires_eagerly(twin, second, twin)
    del old["counters"]["compiled"]  # as saved before there was such an entry
    monkeypatch.setattr(compiled, "_traced", set())
    third_model = net()
    third = attach(third_model, detector=OnSteps(1))
    third.load_state_dict(old)
    assert not fires_eagerly(third_model, third, third_model)


def test_views_opened_by_hand_count_as_open():
    model = net()
    guard = attach(model, edge="dominant")
    guard.views[NAMES[2]].open()
    assert guard.is_open
    loss_of(model).backward()
    assert not guard.step().triggered
    assert not guard.is_open
    assert guard.views[NAMES[2]].openings == 1


def test_a_compiled_program_has_two_graphs_whichever_weights_are_smoothed():
    torch._dynamo.reset()
    model, twin = net(), net()
    subsets = {1: NAMES[:1], 2: NAMES[1:3], 4: NAMES[3:], 5: None, 7: NAMES[:3], 8: NAMES[2:], 10: NAMES[::2]}

    class Named(OnSteps):
        def judge(self, norm, seen):
            verdict = super().judge(norm, seen)
            names = subsets.get(int(self.count), ())
            return verdict._replace(names=names if names is None else tuple(names)) if verdict.triggered else verdict

    counter = CompileCounter()
    compiled_model = torch.compile(model, fullgraph=True, backend=counter)
    policies = GuardPolicy(max_trigger_rate=1), GuardPolicy(prepare="eager", max_trigger_rate=1)
    guards = [
        attach(one, detector=Named(*subsets), policy=policy)
        for one, policy in zip((model, twin), policies, strict=True)
    ]
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.05) for each in (model, twin)]
    for step in range(12):
        for run, guard, optimizer in zip((compiled_model, twin), guards, optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(run, step).backward()
            event = guard.step()
            opened = [name for name, view in guard.views.items() if view.is_open]
            assert opened == list(event.smoothed)
            optimizer.step()
    assert counter.frame_count == 2
    assert [guard.triggers for guard in guards] == [7, 7]
    assert same(snapshot(model), snapshot(twin))
    assert [view.openings for view in guards[0].views.values()] == [4, 3, 5, 3]


def test_views_that_stand_by_are_closed_for_everyone_but_the_compiler():
    model = net()
    guard = attach(model, detector=OnSteps(1, names=(NAMES[1],)), policy=GuardPolicy(prepare="eager"))
    guard.step(1.0)
    view, before = guard.views[NAMES[0]], snapshot(model)
    assert (view.is_open, view.is_read) == (False, True)
    assert model.blocks[0].up.weight is model.blocks[0].up._parameters["weight"]
    assert guard.state_dict()["openings"] == {name: int(name == NAMES[1]) for name in NAMES}
    with torch.no_grad(), guard.preview():
        assert view.is_open
    assert (view.is_open, view.is_read) == (False, True)
    assert same(before, snapshot(model))
    guard.discard()
    assert not any(view.is_read for view in guard.views.values())


def test_the_edge_follows_from_what_the_detector_keeps():
    def edge_of(**options):
        with attach(net(), **options) as guard:
            return next(iter(guard.views.values())).smoothing.edge

    assert edge_of() == "baseline"
    assert edge_of(detector=StableRankFloor()) == "baseline"
    assert edge_of(detector=GradientNormRatio()) == "dominant"
    assert edge_of(edge="dominant") == "dominant"
    assert edge_of(smoothing="log") == "baseline"
    assert edge_of(smoothing="softmax") == edge_of(smoothing="noise") == "dominant"
    with pytest.raises(ArgumentError, match="needs a detector that remembers healthy norms, got GradientNormRatio"):
        attach(net(), edge="baseline", detector=GradientNormRatio())
    with pytest.raises(ArgumentError, match="use 'init' or 'reference'"):
        Smoothing(edge="baseline").level(3, 4)


def events_of(model, guard, optimizer, steps):
    events = []
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        events.append(guard.step())
        optimizer.step()
    return events


def spiked(model, name, factor):
    with torch.no_grad():
        weight = dict(model.named_parameters())[name]
        left, right = torch.randn(weight.shape[0]), torch.randn(weight.shape[1])
        weight.add_(factor * torch.outer(left / left.norm(), right / right.norm()))
        return float(torch.linalg.matrix_norm(weight, 2))


def test_after_a_trigger_weights_are_held_at_their_healthy_norm():
    model = net(width=32)
    guard = attach(model, edge="baseline")
    guard.detector.members[1].leap = math.inf
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    events_of(model, guard, optimizer, 3)
    healthy = {name: float(guard.detector.levels(name)[0]) for name in NAMES}
    broken = spiked(model, NAMES[0], 4.0)
    events = events_of(model, guard, optimizer, 6)  # the power iteration turns to the new direction in a few of them
    assert next(event.held for event in events if event.triggered) is False
    whole = float(torch.linalg.matrix_norm(model.get_parameter(NAMES[0]).detach()))
    now = spectral_norm(model.get_parameter(NAMES[0]).detach())
    assert broken > 2.5 * healthy[NAMES[0]]
    assert float(now) == pytest.approx(healthy[NAMES[0]], abs=0.01 * whole)
    spiked(model, NAMES[1], 1.1 * healthy[NAMES[1]])  # less than a trigger takes, more than an alert lets be
    held = events_of(model, guard, optimizer, 8)
    assert any(event.held and NAMES[1] in event.smoothed for event in held)
    assert guard.triggers == sum(event.triggered and not event.held for event in [*events, *held])
    assert float(spectral_norm(model.get_parameter(NAMES[1]).detach())) < 1.1 * healthy[NAMES[1]]


def test_nothing_is_held_at_an_edge_that_moves_with_the_matrix():
    model = net(width=32)
    guard = attach(model, edge="dominant")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    events_of(model, guard, optimizer, 3)
    spiked(model, NAMES[0], 4.0)
    events = events_of(model, guard, optimizer, 10)
    assert any(event.triggered for event in events)
    assert not any(event.held for event in events)


def test_each_matrix_of_a_fused_weight_comes_down_to_its_own_level():
    torch.manual_seed(0)
    parts = [torch.randn(8, 8) * scale for scale in (1.0, 2.0, 4.0)]
    levels = [torch.linalg.matrix_norm(part, 2) * 0.7 for part in parts]
    smoothing = Smoothing(edge="baseline", tol=1e-5)
    for pieces, whole in ((parts, levels), ([*parts, torch.randn(4, 8)], [*levels, torch.tensor(1e3)])):
        factors = factors_of(pieces, smoothing, torch.Generator(), whole)
        for part, level, pair in zip(parts, levels, factors, strict=False):
            assert float(torch.linalg.matrix_norm(part - pair.left @ pair.right, 2)) == pytest.approx(float(level))
        assert not factors[-1].left.any() or len(pieces) == 3


class Watcher(StableRankFloor):
    """Watches the first weight alone."""

    def bind(self, weights):
        super().bind(lambda: first_of(weights()))

    def look(self, weights):
        return super().look(lambda: first_of(weights()))


def first_of(weights):
    return {name: weights[name] for name in NAMES[:1]}


def test_a_weight_that_no_detector_remembers_is_left_alone():
    model = net(width=32)
    guard = attach(model, edge="baseline", detector=AnyOf(OnSteps(3), Watcher()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    events_of(model, guard, optimizer, 2)
    spiked(model, NAMES[0], 4.0)
    (event,) = events_of(model, guard, optimizer, 1)
    assert [name for name, view in guard.views.items() if view.is_open] == NAMES[:1] == list(event.smoothed)


def test_moments_are_kept_of_what_is_only_held():
    model = net(width=32)
    both = AnyOf(OnSteps(4), StableRankFloor())
    both.members[1].leap = math.inf
    guard = attach(model, edge="baseline", policy=GuardPolicy(reset_moments=True), detector=both)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)

    def step():
        optimizer.zero_grad()
        loss_of(model).backward()
        event = guard.step(optimizer=optimizer)
        stored = dict(model.named_parameters())
        steps = {name: float(optimizer.state[stored[name]].get("step", 0)) for name in NAMES}
        optimizer.step()
        return event, steps

    for _ in range(4):
        event, _ = step()
    assert (event.triggered, event.held) == (True, False)
    assert set(step()[1].values()) == {0.0}
    spiked(model, NAMES[1], 1.5 * float(guard.detector.levels(NAMES[1])[0]))
    seen = [step() for _ in range(14)]
    held = [event for event, _ in seen if event.held]
    assert any(NAMES[1] in event.smoothed for event in held)
    assert seen[-1][1][NAMES[1]] == 14.0
    assert not any(guard.state_dict()["stale"].values())


def test_a_trigger_in_the_cooldown_is_held_back_and_says_so_though_weights_are_held():
    model = net(width=32)
    both = AnyOf(OnSteps(4, 9), StableRankFloor())
    guard = attach(model, edge="baseline", policy=GuardPolicy(cooldown=30), detector=both)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    events_of(model, guard, optimizer, 5)
    spiked(model, NAMES[1], 1.5 * float(guard.detector.levels(NAMES[1])[0]))
    events = events_of(model, guard, optimizer, 14)
    assert any(event.held for event in events)
    assert "held back, cooldown" in events[3].reason
    assert guard.triggers == 1
