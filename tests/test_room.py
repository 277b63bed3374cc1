# SPDX-License-Identifier: Apache-2.0
"""What may outgrow fresh weights in health: recurrent cells live and on disk, kernels before a batch norm."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import Tensor, nn

import pss_param as pss
from pss_param.inspection import TensorInfo
from pss_param.room import DEEP, LIVE, roomy

WIDTH = 16


class Reader(nn.Module):
    """A recurrent network over vectors."""

    def __init__(self, kind: str = "LSTM", **options: object) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(8, WIDTH, batch_first=True, **options)
        sides = 2 if options.get("bidirectional") else 1
        self.head = nn.Linear(options.get("proj_size") or sides * WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class Cells(nn.Module):
    """The same by single steps."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), WIDTH)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state


MODELS = {
    "LSTM": lambda: Reader(num_layers=2, bidirectional=True),
    "projected": lambda: Reader(proj_size=4),
    "GRU": lambda: Reader("GRU"),
    "RNN": lambda: Reader("RNN"),
    "GRUCell": Cells,
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[request.param]()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


def matrices(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if "weight_ih" in name or "weight_hh" in name]


def last(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if isinstance(module, (nn.RNNBase, nn.RNNCellBase)))


def train(model: nn.Module, guard: pss.Guard, x: Tensor, rate: float = 0.1) -> pss.Event:
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    optimizer.zero_grad()
    model(x).square().sum().backward()
    event = guard.step()
    optimizer.step()
    return event


def norm(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.detach(), 2))


def fresh_norm(weight: Tensor, hidden: int = WIDTH) -> float:
    return sum(math.sqrt(side) for side in weight.shape) / math.sqrt(3 * hidden)


def test_the_matrices_of_recurrent_layers_are_targets_live_and_on_disk(model):
    live = pss.select_parameters(model).targets
    infos = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in model.state_dict().items()}
    stored = pss.select_tensors(infos).targets
    assert [target.name for target in live] == [target.name for target in stored] == matrices(model)
    assert {target.role for target in (*live, *stored)} == {"recurrent"}
    for target in live:
        assert target.init_std == pytest.approx(1 / math.sqrt(3 * WIDTH))  # PyTorch draws from +-1/sqrt(hidden)


def test_on_disk_the_initialiser_is_told_by_the_matrix_of_the_state():
    infos = {name: TensorInfo(tuple(v.shape), v.dtype) for name, v in Reader("GRU").state_dict().items()}
    assert {target.init_std for target in pss.select_tensors(infos).targets} == {1 / math.sqrt(3 * WIDTH)}
    del infos["rnn.weight_hh_l0"]
    (alone,) = pss.select_tensors(infos).targets
    assert alone.init_std == 1 / math.sqrt(3 * 8)  # its own columns, as of any matrix


def test_recurrent_matrices_need_no_block_around_them():
    layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 4)})])
    model = nn.ModuleDict({"layers": layers, "rnn": nn.LSTM(4, 4), "stem": nn.Linear(4, 4)})
    chosen = {target.name for target in pss.select_parameters(model).targets}
    assert chosen == {"layers.0.up.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0"}


def test_a_closed_guard_changes_no_bit(model, x):
    kind, keys, before = type(last(model)), list(model.state_dict()), model(x)
    with pss.attach(model) as guard:
        assert set(guard.views) == set(matrices(model))
        assert list(model.state_dict()) == keys
        assert torch.equal(model(x), before)
        assert torch.equal(copy.deepcopy(model)(x), before)
    assert type(last(model)) is kind
    assert torch.equal(model(x), before)


def test_what_is_read_while_open_is_what_is_folded(model, x):
    guard = pss.attach(model)
    train(model, guard, x)
    name = matrices(model)[-1]
    with torch.no_grad():
        model.get_parameter(name).mul_(60)
    assert name in train(model, guard, x, 0.0).smoothed
    with torch.no_grad():
        shown = model(x)
    guard.fold()
    assert torch.equal(model(x), shown)
    weight = model.get_parameter(name)
    assert norm(weight) == pytest.approx(LIVE * fresh_norm(weight), rel=0.05)
    guard.detach()
    assert torch.equal(model(x), shown)


def test_gradients_through_an_open_gate_reach_the_parameter(model, x):
    guard = pss.attach(model)
    train(model, guard, x)
    with torch.no_grad():
        weights = [dict(model.named_parameters())[name] for name in matrices(model)]
        for weight in weights:
            weight.mul_(60)
    assert set(train(model, guard, x, 0.0).smoothed) == set(matrices(model))
    model.zero_grad()
    model(x).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in weights)
    guard.step()
    assert not guard.is_open


def test_a_model_that_has_shown_smoothed_weights_can_be_copied(model, x):
    guard = pss.attach(model)
    train(model, guard, x)
    with torch.no_grad():
        dict(model.named_parameters())[matrices(model)[-1]].mul_(60)
    assert train(model, guard, x, 0.0).smoothed
    shown = model(x)
    assert torch.equal(copy.deepcopy(model)(x), shown)
    shown.sum().backward()
    guard.step()
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    guard.detach()
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_replaced_parameters_are_seen_after_detaching(x):
    model = Reader()
    with pss.attach(model):
        model(x)
        model.rnn._parameters["weight_hh_l0"] = nn.Parameter(torch.zeros(4 * WIDTH, WIDTH))
        seen = model(x)
    assert torch.equal(model(x), seen)
    assert model.rnn._flat_weights[1] is model.rnn.weight_hh_l0


def test_recurrent_weights_may_grow_in_health_and_others_may_not(x):
    torch.manual_seed(0)
    model = Reader()
    guard = pss.attach(model, targets="all")
    train(model, guard, x)
    with torch.no_grad():
        model.rnn.weight_hh_l0.mul_(6)
        model.head.weight.mul_(6)
    assert train(model, guard, x, 0.0).smoothed == ("head.weight",)


def test_an_attached_recurrent_model_can_be_saved_whole(model, x):
    guard = pss.attach(model)
    train(model, guard, x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), model(x))


def grown(state: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {name: factor * value if value.dim() > 1 else value.clone() for name, value in state.items()}


def test_a_deep_repair_clips_recurrent_matrices_at_their_room():
    torch.manual_seed(0)
    state = Reader().state_dict()
    little, much = (grown(state, factor) for factor in (2.0, 50.0))
    deep = pss.RepairOptions(strength="deep")
    assert torch.equal(pss.repair_state_dict(little, deep)[0]["rnn.weight_hh_l0"], little["rnn.weight_hh_l0"])
    after = pss.repair_state_dict(much, deep)[0]
    for name in ("rnn.weight_ih_l0", "rnn.weight_hh_l0"):
        assert norm(after[name]) == pytest.approx(DEEP * fresh_norm(after[name]), rel=1e-2)
    values = torch.linalg.svdvals(after["head.weight"])  # no room: flattened, as everything else
    assert float(values.max()) == pytest.approx(float(values.min()), rel=1e-3)


def test_a_rule_of_the_users_own_holds_for_recurrent_matrices_too():
    torch.manual_seed(0)
    good = Reader().state_dict()
    asked = pss.RepairOptions(strength="deep", edge="reference", reference=grown(good, 10.0))
    after = pss.repair_state_dict(grown(good, 50.0), asked)[0]
    for name in ("rnn.weight_ih_l0", "rnn.weight_hh_l0"):
        assert norm(after[name]) == pytest.approx(10 * norm(good[name]), rel=1e-2)


def convolutional(norms: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(8, 24, 3),
        nn.BatchNorm2d(24) if norms else nn.GroupNorm(4, 24),
        nn.ReLU(),
        nn.Conv2d(24, 12, 3),
    ]
    return nn.Sequential(*layers, nn.BatchNorm2d(12) if norms else nn.GroupNorm(4, 12)).state_dict()


def test_kernels_before_a_batch_norm_have_room_and_no_others():
    for norms, expected in ((True, {"0.weight", "3.weight"}), (False, set())):
        state = convolutional(norms)
        infos = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in state.items()}
        assert roomy(pss.select_tensors(infos).targets, infos) == expected


def test_a_kernel_is_told_by_as_many_channels():
    state = convolutional(True)
    del state["1.running_var"]
    infos = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in state.items()}
    assert roomy(pss.select_tensors(infos).targets, infos) == {"3.weight"}


@pytest.mark.parametrize(("norms", "strength"), [(True, "gentle"), (False, "deep")])
def test_growth_of_kernels_before_a_batch_norm_is_no_sign_of_death(norms, strength):
    report = pss.repair_state_dict(grown(convolutional(norms), 7.0))[1]
    assert report.options["strength"] == strength
    assert ("3 times that before a batch norm" in report.reason) == norms
    assert pss.repair_state_dict(grown(convolutional(norms), 21.0))[1].options["strength"] == "deep"


def test_a_deep_repair_clips_kernels_before_a_batch_norm():
    state = grown(convolutional(True), 40.0)
    after, report = pss.repair_state_dict(state, pss.RepairOptions(strength="deep"))
    kernel = after["3.weight"].flatten(1)
    assert norm(kernel) == pytest.approx(DEEP * fresh_norm(kernel, kernel.shape[1]), rel=1e-2)
    again, _ = pss.repair_state_dict(after, pss.RepairOptions(strength="deep"))
    assert "3.weight" in report.changed
    torch.testing.assert_close(again["3.weight"], after["3.weight"], rtol=1e-5, atol=1e-6)
