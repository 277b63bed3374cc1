# SPDX-License-Identifier: Apache-2.0
"""Damping: what it does to an update, when it hooks optimizers, and that nobody else notices."""

from __future__ import annotations

import copy
import gc
import logging
import math
import weakref
from collections.abc import Callable

import pytest
import tiny_gpt
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.optim import optimizer as hooks

import pss_param as pss
from pss_param.damping import Damping

OPTIMIZERS = {
    "SGD": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9, nesterov=True),
    "AdamW": lambda params, lr: torch.optim.AdamW(params, lr=lr, weight_decay=0.1),
    "RMSprop": lambda params, lr: torch.optim.RMSprop(params, lr=lr),
    "Muon": lambda params, lr: torch.optim.Muon(params, lr=lr),
}


def hooked() -> int:
    return len(hooks._global_optimizer_pre_hooks) + len(hooks._global_optimizer_post_hooks)


def pair(seed: int = 0) -> nn.ParameterDict:
    generator = torch.Generator().manual_seed(seed)
    return nn.ParameterDict({name: torch.randn(6, 5, generator=generator) for name in ("damped", "free")})


def gradients(weights: nn.ParameterDict, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in weights.values():
        weight.grad = torch.randn(weight.shape, generator=generator)


def net(width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def train(model: nn.Module, guard: pss.Guard, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        model(torch.randn(4, 16, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        guard.step()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rho", [math.sqrt(2), 8.0])
def test_a_damped_update_is_that_of_a_smaller_learning_rate_and_others_are_as_ever(name, rho):
    weights, slow, plain = pair(), pair(), pair()
    damping = Damping(weights.get)
    damping.forgetting = 1.0
    makers = [OPTIMIZERS[name](of.values(), lr) for of, lr in ((weights, 0.05), (slow, 0.05 / rho), (plain, 0.05))]
    damping.strike({"damped": rho})
    for step in range(5):
        for of, optimizer in zip((weights, slow, plain), makers, strict=True):
            gradients(of, step)
            optimizer.step()
        damping.forget()
    torch.testing.assert_close(weights["damped"], slow["damped"])
    assert not torch.allclose(weights["damped"], plain["damped"])
    assert torch.equal(weights["free"], plain["free"])
    damping.stop()


class NoForeach(torch.Tensor):
    """A subclass that has no operation on lists, as some quantised tensors."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if "foreach" in getattr(func, "__name__", ""):
            raise NotImplementedError(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_tensor_subclasses_are_copied_one_by_one_and_leave_the_others_alone():
    torch.manual_seed(0)
    plain = {str(i): nn.Parameter(torch.zeros(4, 4)) for i in range(3)}
    odd = nn.Parameter(torch.zeros(4, 4).as_subclass(NoForeach))
    weights = plain | {"odd": odd}
    damping = Damping(weights.get)
    damping.strike(dict.fromkeys(weights, 4.0))
    optimizer = torch.optim.SGD(weights.values(), lr=1.0, foreach=False)
    for weight in weights.values():
        weight.grad = torch.ones(4, 4)
    optimizer.step()
    for weight in weights.values():
        assert torch.equal(weight.detach().as_subclass(torch.Tensor), torch.full((4, 4), -0.25))
    damping.stop()


@given(st.lists(st.booleans(), max_size=60), st.floats(1.0, 4.0))
def test_factors_follow_the_formula_and_hooks_are_there_while_there_are_any(strikes, factor):
    before = hooked()
    damping, rho = Damping(pair().get), 1.0
    for strike in strikes:
        damping.forget()
        rho = max(1.0, 0.99 * rho)
        if strike:
            damping.strike({"damped": factor})
            rho = min(64.0, factor * rho)
        assert damping.rho.get("damped", 1.0) == pytest.approx(rho)
        assert hooked() - before == (2 if rho > 1 else 0)
    damping.stop()
    assert hooked() == before
    assert not damping.rho


class Blocks(nn.Module):
    """Two blocks between an embedding and a head, with norms, biases, a tied bias and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 16)
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])
        self.norms = nn.ModuleList([nn.LayerNorm(16) for _ in range(2)])
        self.head = nn.Linear(16, 8)
        self.norms[1].bias = self.norms[0].bias
        self.layers[1].bias.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + torch.tanh(layer(norm(x)))
        return self.head(x)


class Paces(pss.Detector):
    """Fire at every step for all weights, and tell paces."""

    keeps_levels = True

    def __init__(self, pace: dict[str, float] | None, names: tuple[str, ...] | None = None) -> None:
        super().__init__()
        self.pace, self.names = pace, names

    def judge(self, norm, seen):
        return pss.Verdict(True, self.names, pace=self.pace)

    def levels(self, name):
        return (torch.tensor(0.5),)


FOLLOWERS = {"layers.0.bias", "norms.0.weight", "norms.0.bias", "norms.1.weight"}


def moves_of(
    edge: str, paces: dict[str, float] | None, names: tuple[str, ...] | None = None, **policy
) -> tuple[dict[str, float], dict[str, float]]:
    """How far one step of SGD moves each parameter, over how far it moves it in an unguarded twin; and the damping."""
    torch.manual_seed(0)
    model = Blocks()
    plain = copy.deepcopy(model)
    detector = Paces(paces, names)
    guard = pss.attach(model, edge=edge, detector=detector, policy=pss.GuardPolicy(max_trigger_rate=1.0, **policy))
    before = {name: value.detach().clone() for name, value in plain.named_parameters()}
    for of in (model, plain):
        optimizer = torch.optim.SGD(of.parameters(), lr=1e-2)
        of(torch.arange(8)).square().sum().backward()
        if of is model:
            guard.step()
        optimizer.step()
    whole = {name: value.detach() for name, value in plain.named_parameters()}
    damping = guard.damping
    moves = {
        name: float((value.detach() - before[name]).norm() / (whole[name] - before[name]).norm())
        for name, value in model.named_parameters()
        if value.requires_grad
    }
    guard.detach()
    return moves, damping


def test_a_weight_is_damped_by_its_pace_and_companions_by_the_mean():
    moves, damping = moves_of("baseline", {"layers.0.weight": 0.048, "layers.1.weight": 0.012})
    assert damping == {"layers.0.weight": pytest.approx(16.0), "layers.1.weight": pytest.approx(4.0)}
    assert moves["layers.0.weight"] == pytest.approx(1 / 16, rel=1e-3)
    assert moves["layers.1.weight"] == pytest.approx(1 / 4, rel=1e-3)
    for name in FOLLOWERS:
        assert moves[name] == pytest.approx(1 / 8, rel=1e-3), name
    for name in moves.keys() - FOLLOWERS - damping.keys():
        assert moves[name] == 1.0, name
    assert {"embedding.weight", "head.weight", "head.bias"} < moves.keys()


def test_a_weight_that_is_not_damped_counts_in_the_mean():
    moves, damping = moves_of("baseline", {"layers.0.weight": 0.048, "layers.1.weight": 0.001})
    assert list(damping) == ["layers.0.weight"]
    assert moves["norms.0.weight"] == pytest.approx(1 / 4, rel=1e-3)
    assert moves["layers.1.weight"] == 1.0


def test_a_pace_that_is_fast_enough_is_the_policys():
    damping = moves_of("baseline", {"layers.0.weight": 0.048}, pace=0.024)[1]
    assert damping == {"layers.0.weight": pytest.approx(2.0)}
    assert moves_of("baseline", {"layers.0.weight": 0.048}, pace=math.inf)[1] == {}
    assert moves_of("baseline", {"layers.0.weight": 0.048}, damping=1)[1] == {}


def test_a_spike_without_a_weight_above_its_level_slows_down_the_companions_alone():
    moves, damping = moves_of("baseline", {})
    assert damping == {}
    for name, moved in moves.items():
        assert moved == pytest.approx(0.5 if name in FOLLOWERS else 1.0, rel=1e-3), name


def test_a_trigger_that_names_its_weights_is_no_spike():
    moves, damping = moves_of("baseline", {}, names=("layers.0.weight",))
    assert damping == {}
    assert set(moves.values()) == {1.0}


def test_the_companions_factor_of_spikes_is_forgotten_saved_and_copied_like_the_others():
    model = Blocks()
    guard = pss.attach(model, edge="baseline", detector=Paces({}))
    before = hooked()
    for _ in range(3):
        model(torch.arange(8)).square().sum().backward()
        guard.step()
    factor = 2 * (0.99 * 2 * (0.99 * 2))
    state = guard.state_dict()
    assert state["following"] == pytest.approx(factor)
    assert hooked() == before + 2
    twin = copy.deepcopy((model, guard))[1]
    assert twin.state_dict()["following"] == state["following"]
    twin.detach()
    guard.load_state_dict({**state, "following": 1.0})
    assert hooked() == before
    guard.load_state_dict(state)
    assert guard.state_dict()["following"] == state["following"]
    assert hooked() == before + 2
    guard.detach()
    assert hooked() == before
    plain = pss.attach(model, edge="baseline", detector=Paces({}), policy=pss.GuardPolicy(damping=1))
    plain.load_state_dict(state)
    assert plain.state_dict()["following"] == 1.0
    plain.detach()


def test_where_nobody_measures_paces_what_is_smoothed_is_damped_by_the_policys_factor():
    both = {"layers.0.weight": 3.0, "layers.1.weight": 3.0}
    assert moves_of("baseline", None, damping=3.0)[1] == both


def test_at_other_edges_nothing_follows():
    moves, damping = moves_of("dominant", None, damping=3.0)
    assert len(damping) == 2
    for name in FOLLOWERS:
        assert moves[name] == 1.0


def test_a_gradient_that_is_judged_a_step_later_tells_no_pace():
    model = net(width=32)
    both = pss.AnyOf(pss.GradientNormRatio(), pss.StableRankFloor())
    guard = pss.attach(model, targets="all", detector=both, policy=pss.GuardPolicy(deferred=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step() -> None:
        model(torch.randn(4, 32, generator=torch.Generator().manual_seed(0))).square().sum().backward()
        guard.step()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(4):
        step()
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(1.5)
    for _ in range(2):
        step()
    assert guard.damping == {"0.weight": pytest.approx(2**0.5)}
    guard.detach()


def test_companions_are_found_after_they_have_been_replaced_and_not_after_a_detaching():
    model = Blocks()
    guard = pss.attach(model, edge="baseline", detector=Paces({"layers.0.weight": 0.012, "layers.1.weight": 0.012}))
    model.norms[0].weight = nn.Parameter(torch.ones(16))
    model(torch.arange(8)).square().sum().backward()
    guard.step()
    optimizer = torch.optim.SGD([model.norms[0].weight], lr=1.0)
    optimizer.step()
    moved = float((model.norms[0].weight.detach() - 1).norm() / model.norms[0].weight.grad.norm())
    assert moved == pytest.approx(1 / 4, rel=1e-3)
    guard.detach()
    assert moved_as_a_whole(model.norms[0], torch.optim.SGD(model.norms[0].parameters(), lr=1e-3))


@pytest.mark.parametrize("pace", [0.0, -1.0, math.nan])
def test_a_pace_that_nothing_could_keep_to_is_refused(pace):
    with pytest.raises(pss.ArgumentError, match="pace must be above 0"):
        pss.GuardPolicy(pace=pace)


def test_a_factor_halves_in_69_steps():
    damping = Damping(pair().get)
    damping.strike({"damped": 8.0})
    for _ in range(69):
        damping.forget()
    assert damping.rho["damped"] == pytest.approx(4.0, rel=0.01)
    damping.stop()


def test_optimizers_are_left_alone_before_the_first_trigger_and_after_detaching():
    before, model = hooked(), net()
    guard = pss.attach(model, targets="all", detector=tiny_gpt.FiresAt(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    train(model, guard, optimizer, range(2))
    assert hooked() == before
    assert guard.damping == {}
    train(model, guard, optimizer, range(2, 3))
    assert hooked() == before + 2
    assert guard.damping == {"0.weight": 2**0.5, "2.weight": 2**0.5}
    guard.detach()
    assert hooked() == before


def damped_net() -> tuple[nn.Module, pss.Guard, torch.optim.Optimizer]:
    model = net()
    guard = pss.attach(model, targets="all", detector=tiny_gpt.FiresAt(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    train(model, guard, optimizer, range(1))
    assert guard.damping
    return model, guard, optimizer


def moved_as_a_whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Whether an update is the optimizer's own, with nothing taken back."""
    weight = next(iter(model.parameters()))
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    return torch.allclose(weight, before - 1e-3)


def test_a_guard_that_is_dropped_lets_its_model_go():
    model, guard, optimizer = damped_net()
    assert not moved_as_a_whole(model, optimizer)
    gone = weakref.ref(guard)
    del guard
    gc.collect()
    assert gone() is None
    assert moved_as_a_whole(model, optimizer)


def collect(*_: object) -> None:
    gc.collect()


def test_guards_that_are_collected_inside_a_step_disturb_nobody():
    model, guard, optimizer = damped_net()
    gc.disable()  # so that they are collected by the hook, while torch goes through all hooks
    dropped = [weakref.ref(damped_net()[1]) for _ in range(3)]
    others = [hooks.register_optimizer_step_pre_hook(hook) for hook in (collect, lambda *_: None)]
    try:
        assert all(one() is not None for one in dropped)
        assert not moved_as_a_whole(model, optimizer)
        assert all(one() is None for one in dropped)
    finally:
        gc.enable()
        for handle in others:
            handle.remove()
    guard.detach()


def test_a_state_that_is_loaded_before_the_optimizer_steps_is_what_counts():
    model, guard, optimizer = damped_net()
    healthy = {**guard.state_dict(), "damping": {}}
    guard._damping.before(optimizer)  # as if its step had begun
    guard.load_state_dict(healthy)
    assert moved_as_a_whole(model, optimizer)
    guard.detach()


def test_a_detaching_that_is_refused_leaves_the_damping():
    guard = damped_net()[1]
    with guard.preview(), pytest.raises(pss.StateError, match="preview"):
        guard.detach()
    assert guard.damping
    guard.detach()
    assert guard.damping == {}


@pytest.mark.parametrize("ends_with", [pss.detach, None])
def test_what_is_detached_in_any_way_is_damped_no_more(ends_with):
    model, guard, optimizer = damped_net()
    if ends_with is None:
        guard.detach()
    else:
        ends_with(model)
        again = pss.attach(model, targets="all", detector=tiny_gpt.FiresAt())
        assert again.damping == {}
    assert moved_as_a_whole(model, optimizer)


def test_the_copy_of_a_guard_damps_the_copy_of_the_model_and_nothing_else():
    model, guard, optimizer = damped_net()
    twin, copied = copy.deepcopy((model, guard))
    assert copied.damping == guard.damping
    guard.detach()
    assert moved_as_a_whole(model, optimizer)
    assert not moved_as_a_whole(twin, torch.optim.SGD(twin.parameters(), lr=1e-3))
    copied.detach()


def test_a_policy_that_damps_nothing_keeps_to_that_after_a_resumption():
    model, guard, optimizer = damped_net()
    state = guard.state_dict()
    guard.detach()
    plain = pss.attach(model, targets="all", detector=tiny_gpt.FiresAt(), policy=pss.GuardPolicy(damping=1))
    plain.load_state_dict(state)
    assert plain.damping == {}
    assert moved_as_a_whole(model, optimizer)


def test_a_weight_that_is_gone_stops_nobodys_optimizer():
    model, guard, _ = damped_net()
    del model[0]._parameters["weight"]
    weights = pair()
    gradients(weights, 0)
    torch.optim.SGD(weights.values(), lr=0.1).step()
    assert guard.damping


def test_a_weight_without_a_gradient_is_not_touched():
    model, guard, optimizer = damped_net()
    for parameter in model.parameters():
        parameter.grad = None
    versions = [parameter._version for parameter in model.parameters()]
    optimizer.step()
    assert [parameter._version for parameter in model.parameters()] == versions
    guard.detach()


def test_without_damping_a_trigger_changes_no_update():
    model, twin = net(), net()
    guard = pss.attach(model, targets="all", detector=tiny_gpt.FiresAt(1), policy=pss.GuardPolicy(damping=1))
    optimizers = [torch.optim.AdamW(of.parameters(), lr=1e-2) for of in (model, twin)]
    train(model, guard, optimizers[0], range(1))
    with pss.attach(twin, targets="all", detector=tiny_gpt.FiresAt()) as other:
        train(twin, other, optimizers[1], range(1))
    assert guard.damping == {}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def by_hand(model, guard, optimizer, step):
    train(model, guard, optimizer, range(step, step + 1))


def watched(model, guard, optimizer, step):
    guard.watch(optimizer)
    optimizer.zero_grad()
    model(torch.randn(4, 16, generator=torch.Generator().manual_seed(step))).square().sum().backward()
    optimizer.step()


def in_a_closure(model, guard, optimizer, step):
    def closure():
        optimizer.zero_grad()
        loss = model(torch.randn(4, 16, generator=torch.Generator().manual_seed(step))).square().sum()
        loss.backward()
        guard.step(optimizer=optimizer)
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("way", [watched, in_a_closure])
def test_a_guard_that_steps_inside_the_optimizers_step_damps_alike(way):
    ends = []
    for kind in (by_hand, way):
        model = net()
        guard = pss.attach(model, targets="all", detector=tiny_gpt.FiresAt(2, 3, 4, 9))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(12):
            kind(model, guard, optimizer, step)
        assert guard.damping
        guard.detach()
        ends.append(model)
    assert all(torch.equal(a, b) for a, b in zip(*(end.parameters() for end in ends), strict=True))


def test_other_optimizers_are_not_slowed_down():
    model = net()
    guard = pss.attach(model, targets="all", detector=tiny_gpt.FiresAt(1))
    train(model, guard, torch.optim.SGD(model.parameters(), lr=1e-3), range(1))
    assert guard.damping
    weights, plain = pair(), pair()
    for of in (weights, plain):
        gradients(of, 0)
    torch.optim.SGD(weights.values(), lr=0.5).step()
    guard.detach()
    torch.optim.SGD(plain.values(), lr=0.5).step()
    assert all(torch.equal(weights[name], plain[name]) for name in plain)


def test_a_step_that_the_scaler_leaves_out_changes_nothing():
    weights = pair()
    damping = Damping(weights.get)
    optimizer = torch.optim.AdamW(weights.values(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    damping.strike({"damped": 4.0}, optimizer)
    before = copy.deepcopy(weights)
    gradients(weights, 0)
    weights["free"].grad[0, 0] = math.inf
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    damping.forget()
    assert all(torch.equal(weights[name], before[name]) for name in weights)
    damping.stop()


class Stumbles(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        raise KeyboardInterrupt


def test_an_optimizer_that_is_interrupted_leaves_what_it_made_and_the_next_step_is_damped():
    weights, plain = pair(), pair()
    damping = Damping(weights.get)
    damping.forgetting = 1.0
    damping.strike({"damped": 2.0})
    gradients(weights, 0)
    gradients(plain, 0)
    # The class is hooked when it is first made; SGD inside is hooked too, and damps before the interruption.
    with pytest.raises(KeyboardInterrupt):
        Stumbles(weights.values(), lr=0.5).step()
    torch.optim.SGD(plain.values(), lr=0.25).step()
    torch.testing.assert_close(weights["damped"], plain["damped"])
    damping.forget()
    gradients(weights, 1)
    gradients(plain, 1)
    torch.optim.SGD(weights.values(), lr=0.5).step()
    torch.optim.SGD(plain.values(), lr=0.25).step()
    torch.testing.assert_close(weights["damped"], plain["damped"])
    damping.stop()


def test_a_resumed_run_goes_on_bit_by_bit():
    def begin():
        model = net()
        guard = pss.attach(model, targets="all", detector=tiny_gpt.FiresAt(2, 3, 12))
        return model, guard, torch.optim.AdamW(model.parameters(), lr=1e-2)

    whole, resumed = begin(), begin()
    train(*whole, range(6))
    saved = [part.state_dict() for part in whole]
    assert saved[1]["damping"]["0.weight"] > 1
    saved = copy.deepcopy(saved)
    train(*whole, range(6, 15))
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    resumed[1].detector.count = 6
    train(*resumed, range(6, 15))
    assert resumed[1].damping == whole[1].damping != {}
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), resumed[0].parameters(), strict=True))


def test_a_state_of_before_there_was_damping_loads():
    model = net()
    guard = pss.attach(model, targets="all", detector=tiny_gpt.FiresAt(1))
    train(model, guard, torch.optim.SGD(model.parameters(), lr=1e-3), range(1))
    state = guard.state_dict()
    del state["damping"]
    guard.load_state_dict(state)
    assert guard.damping == {}
    guard.detach()


def test_an_optimizer_that_cannot_be_hooked_is_told_of_once(caplog):
    model = net()
    guard = pss.attach(model, targets="all", detector=tiny_gpt.FiresAt(1, 2, 3, 4, 5))
    with caplog.at_level(logging.WARNING, logger="pss_param"):
        for step in range(60):
            model(torch.randn(4, 16, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            guard.step()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(parameter.grad, alpha=1e-3)
            model.zero_grad()
    assert sum("no torch.optim.Optimizer has moved them" in message for message in caplog.messages) == 1
    guard.detach()


@pytest.mark.parametrize("damping", [0.5, -1.0, math.inf, math.nan])
def test_a_damping_that_would_speed_up_or_stop_is_refused(damping):
    with pytest.raises(pss.ArgumentError, match="damping must be at least 1 and finite"):
        pss.GuardPolicy(damping=damping)


def test_repeated_triggers_become_fewer_at_a_deadly_rate():
    def triggers(damping: float) -> int:
        model = tiny_gpt.build(0)
        guard = pss.attach(model, policy=pss.GuardPolicy(damping=damping))
        optimizer = torch.optim.AdamW(model.parameters(), lr=tiny_gpt.RATE)
        for step in range(60):
            tiny_gpt.loss_of(model, step).backward()
            guard.step()
            optimizer.step()
            optimizer.zero_grad()
        return sum(view.openings for view in guard.views.values())

    assert triggers(2**0.5) < triggers(1.0)


def compiled_step(optimizer: torch.optim.Optimizer) -> tuple[Callable[[], None], CompileCounter]:
    torch._dynamo.reset()
    counter = CompileCounter()
    return torch.compile(lambda: optimizer.step(), backend=counter), counter


def test_a_compiled_optimizer_is_compiled_once_and_damped_all_the_same():
    weights, twins = pair(), pair()
    # A learning rate that is no tensor would be compiled for its value.
    optimizer, eager = (torch.optim.AdamW(held.values(), lr=torch.tensor(0.1)) for held in (weights, twins))
    step, counter = compiled_step(optimizer)
    dampings = Damping(weights.get), Damping(twins.get)
    for at in range(24):
        for held, damping in zip((weights, twins), dampings, strict=True):
            gradients(held, at)
            if at in {3, 16}:  # twice, so that the hooks go and come again
                damping.strike({"damped": 1.05})
            damping.forget()
        step()
        eager.step()
        assert dampings[0].rho == dampings[1].rho
        torch.testing.assert_close(dict(weights), dict(twins))
    assert counter.frame_count == 1


def test_watching_a_compiled_optimizer_compiles_nothing_at_every_step():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.3))
    guard = pss.attach(model, targets="all")
    guard.watch(optimizer)
    step, counter = compiled_step(optimizer)
    for at in range(12):
        model(torch.randn(4, 16, generator=torch.Generator().manual_seed(at))).square().sum().backward()
        step()
        optimizer.zero_grad()
    assert guard.steps == 12
    assert counter.frame_count <= 1
