# SPDX-License-Identifier: Apache-2.0
"""What people will do to a guard: each works as they would expect, or raises our error."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from pss_param.attaching import attach
from pss_param.errors import ArgumentError, StateError
from pss_param.guard import detach
from pss_param.policy import GuardPolicy
from pss_param.targets import TargetRules


def stack(seed=0, layers=3):
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(12, 12) for _ in range(layers)))


def open_all(guard):
    matrices = guard._matrices()
    for name, view in guard.views.items():  # each to half its norm, so that it has something to lose
        view.open(tuple(torch.linalg.matrix_norm(part.float(), 2) / 2 for part in matrices[name]))


def snapshot(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one, two):
    return list(one) == list(two) and all(torch.equal(one[key], two[key]) for key in one)


def backward(model):
    model(torch.randn(4, 12)).square().mean().backward()


# Two guards, one model.


def test_a_second_guard_on_a_guarded_model_or_a_part_of_it_is_refused_and_harmless():
    model = stack()
    guard = attach(model, targets="all")
    before = snapshot(model)
    for again in (model, model[0], nn.Sequential(model, nn.Linear(12, 12))):
        with pytest.raises(StateError, match="guarded already"):
            attach(again, targets="all")
    assert same(before, snapshot(model))
    backward(model)
    guard.step()
    guard.detach()
    attach(model, targets="all").detach()


def test_two_guards_on_two_parts_work_side_by_side():
    model = stack(layers=4)
    guards = [attach(part, targets="all") for part in (model[:2], model[2:])]
    assert [len(guard.views) for guard in guards] == [2, 2]
    backward(model)
    for guard in guards:
        guard.step()
    open_all(guards[0])
    shown = snapshot(model)
    guards[0].detach()
    assert same(shown, snapshot(model))
    assert parametrize.is_parametrized(model[2])
    guards[1].detach()
    assert not any(parametrize.is_parametrized(module) for module in model)


def test_a_second_attach_after_detach_through_the_module_function():
    model = stack()
    guard = attach(model, targets="all")
    detach(model)
    with attach(model, targets="all") as second:
        backward(model)
        assert second.step().step == 1
    with pytest.raises(StateError, match="attach again"):
        guard.step(1.0)  # its views are gone, though nobody told it


# Weights that cannot take a view.


def test_frozen_weights_are_left_alone_until_they_thaw():
    model = stack()
    model[0].weight.requires_grad_(False)
    guard = attach(model, targets="all")
    assert list(guard.views) == ["1.weight", "2.weight"]
    guard.detach()
    model[0].weight.requires_grad_(True)
    assert len(attach(model, targets="all").views) == 3
    with pytest.raises(ArgumentError, match="frozen"):
        attach(stack().requires_grad_(False), targets="all")


def test_a_weight_frozen_under_the_guard_is_still_folded_and_restored():
    model = stack()
    guard = attach(model, targets="all")
    model[0].weight.requires_grad_(False)
    open_all(guard)
    backward(model)
    shown = snapshot(model)
    guard.detach()
    assert same(shown, snapshot(model))
    assert not model[0].weight.requires_grad


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_layers_are_left_alone():
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    packed = torch.ao.quantization.quantize_dynamic(model, {"0"}, dtype=torch.qint8)
    assert list(attach(packed, targets="all").views) == ["1.weight"]
    integer = stack()
    integer[0].weight = nn.Parameter(torch.zeros(12, 12, dtype=torch.int8), requires_grad=False)
    guard = attach(integer, targets="all")
    assert list(guard.views) == ["1.weight", "2.weight"]


# Other parametrizations.


def test_a_weight_normed_layer_is_skipped_or_refused_by_name_and_the_rest_guarded():
    model = stack()
    parametrizations.weight_norm(model[1])
    guard = attach(model, targets="all")
    assert "0.weight" in guard.views
    assert not any("1." in name for name in guard.views)
    open_all(guard)
    backward(model)
    guard.detach()
    assert parametrize.is_parametrized(model[1])
    assert not parametrize.is_parametrized(model[0])


def test_weight_norm_registered_over_a_view_has_to_go_first():
    model = stack()
    guard = attach(model, targets="all")
    parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    backward(model)
    before = snapshot(model)
    with pytest.raises(StateError, match="remove that one first"):
        guard.detach()
    assert same(before, snapshot(model))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, weight):
        return self.factor * weight


def test_what_is_put_over_a_view_is_found_by_optimizers_and_learns():
    model = stack()
    attach(model, targets="all")
    over = Scaled()
    parametrize.register_parametrization(model[0], "weight", over)
    assert dict(model.named_parameters())["0.parametrizations.weight.1.factor"] is over.factor
    assert sum(parameter is over.factor for parameter in model.parameters()) == 1
    assert [module for module in model.modules() if module is over] == [over]
    backward(model)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert over.factor.item() != 1


def test_detach_by_function_is_noticed_where_the_layer_keeps_another_parametrization():
    model = stack()
    guard = attach(model, TargetRules(preset="all"))
    parametrize.register_parametrization(model[0], "bias", nn.Tanh())
    backward(model)
    guard.step()
    detach(model)
    backward(model)
    with pytest.raises(StateError, match="has removed its views"):
        guard.step()


def test_a_model_that_is_cast_after_attach_is_guarded_in_its_new_precision():
    model = stack()
    guard = attach(model, targets="all")
    model.double()
    model(torch.randn(4, 12, dtype=torch.float64)).sum().backward()
    assert not guard.step().triggered
    assert len(list(guard.detector.members)[1].baseline) == 3


def test_lora_through_peft_before_and_after_attach():
    peft = pytest.importorskip("peft")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x):
            return self.second(self.first(x))

    config = peft.LoraConfig(target_modules=["first"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(Net(), config)
    with pytest.raises(ArgumentError, match=r"roles of the matrices here: lora.*frozen"):
        attach(model, TargetRules(preset="all"))  # the base is frozen, and factors of a weight are not weights
    model.base_model.model.second.weight.requires_grad_(True)
    guard = attach(model, TargetRules(preset="all"))
    assert list(guard.views) == ["base_model.model.second.weight"]
    open_all(guard)
    backward(model)
    guard.detach()

    base = Net()
    guard = attach(base, TargetRules(preset="all"))
    open_all(guard)
    x = torch.randn(2, 12)
    shown = base(x).detach()
    wrapped = peft.get_peft_model(base, peft.LoraConfig(target_modules=["first"], r=2))
    assert torch.equal(wrapped(x).detach(), shown)
    guard.fold()
    assert torch.equal(wrapped(x).detach(), shown)
    wrapped.merge_and_unload()
    assert torch.allclose(base(x), shown, atol=1e-5)


# Life cycle while a gate is open.


def test_detach_while_open_keeps_what_was_shown_also_inside_a_training_step():
    model = stack()
    guard = attach(model, targets="all")
    open_all(guard)
    loss = model(torch.randn(4, 12)).square().mean()
    shown = snapshot(model)
    guard.detach()  # between forward and backward: autograd sees that saved weights were written
    assert same(shown, snapshot(model))
    assert loss.isfinite()


@pytest.mark.parametrize("order", ["model first", "guard first"])
def test_loading_while_open_takes_the_loaded_values_whatever_the_order(order):
    saved, healthy = stack(seed=1), stack(seed=2)
    keeper = attach(saved, targets="all")
    backward(saved)
    keeper.step()
    state = keeper.state_dict()
    model = stack()
    guard = attach(model, targets="all")
    open_all(guard)
    backward(model)
    loads = [lambda: model.load_state_dict(healthy.state_dict()), lambda: guard.load_state_dict(state)]
    for load in loads if order == "model first" else reversed(loads):
        load()
    assert not guard.is_open
    assert same(snapshot(model), snapshot(healthy))
    assert guard.steps == 1


def test_a_partial_load_closes_only_what_it_replaced():
    model = stack()
    guard = attach(model, targets="all")
    open_all(guard)
    model[0].load_state_dict(nn.Linear(12, 12).state_dict())
    assert [view.is_open for view in guard.views.values()] == [False, True, True]


def test_moving_the_model_while_open_keeps_what_is_shown():
    model = stack()
    guard = attach(model, targets="all")
    open_all(guard)
    backward(model)
    shown = snapshot(model)
    model.double()
    assert all(value.dtype == torch.float64 for value in model.state_dict().values())
    backwards = {name: value.float() for name, value in snapshot(model).items()}
    assert all(torch.allclose(shown[name], backwards[name], atol=1e-6) for name in shown)
    guard.detach()


# The gate between forward and backward.


def test_every_way_to_move_a_gate_between_forward_and_backward_is_refused_or_right():
    def run(model, x):
        return checkpoint(lambda x: model(x).tanh(), x, use_reentrant=False).square().sum()

    model = stack()
    guard = attach(model, targets="all")
    x = torch.randn(4, 12)
    loss = run(model, x)
    open_all(guard)
    with pytest.raises(StateError, match="between a forward pass and its backward"):
        loss.backward()
    guard.discard()
    open_all(guard)
    loss = run(model, x)
    with pytest.raises(StateError, match="has not come"):
        guard.discard()
    guard.fold()
    loss.backward()  # recomputed from the folded weights, which have the bits that were read
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    run(model, x).backward()
    assert all(torch.equal(old, new.grad) for old, new in zip(gradients, model.parameters(), strict=True))


def test_guard_calls_from_inside_a_backward_pass_are_refused():
    model = stack()
    guard = attach(model, targets="all")
    calls = (lambda: guard.step(1.0), guard.fold, guard.discard, guard.detach, lambda: guard.load_state_dict({}))
    for call in calls:
        output = model(torch.randn(1, 12)).sum()
        output.register_hook(lambda gradient, call=call: call())
        with pytest.raises(StateError, match="while a backward pass runs"):
            output.backward()
    assert not guard.is_open
    assert guard.steps == 0


def test_a_step_that_forgot_to_fold_cannot_happen_twice_in_a_row():
    model = stack()
    guard = attach(model, targets="all", policy=GuardPolicy(max_trigger_rate=1))
    for _ in range(3):
        backward(model)
        guard.step()
        for view in guard.views.values():
            if not view.is_open:
                view.open((torch.tensor(0.5),))
    assert all(view.openings == 2 for view in guard.views.values())


def test_the_copy_of_a_watching_guard_does_not_watch():
    model = stack()
    guard = attach(model, targets="all")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard.watch(optimizer)
    twin, copied = copy.deepcopy((model, guard))
    backward(twin)
    copied.step()
    assert (guard.steps, copied.steps) == (0, 1)
