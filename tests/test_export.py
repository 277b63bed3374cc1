# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from pss_param.attaching import attach
from pss_param.errors import ArgumentError, CheckpointError
from pss_param.export import export, plain_state_dict
from pss_param.view import SmoothingView


def test_hand_registered_views_get_plain_names_and_the_same_tensors():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    plain_keys = set(model.state_dict())
    for index in (0, 2):
        parametrize.register_parametrization(model[index], "weight", SmoothingView())
    state = model.state_dict()
    assert "0.parametrizations.weight.original" in state
    plain = plain_state_dict(state)
    assert set(plain) == plain_keys
    assert plain["0.weight"] is state["0.parametrizations.weight.original"]
    nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).load_state_dict(plain, strict=True)


def test_a_bare_layer_has_keys_without_a_prefix():
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", SmoothingView())
    assert set(plain_state_dict(layer.state_dict())) == {"weight", "bias"}


@pytest.mark.parametrize(
    "foreign", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_foreign_parametrizations_are_refused_by_name(foreign):
    model = nn.Sequential(nn.Linear(4, 4))
    foreign(model[0])
    with pytest.raises(CheckpointError, match=r"another parametrization of 0\.weight"):
        plain_state_dict(model.state_dict())


def test_two_keys_for_one_weight_are_refused():
    with pytest.raises(CheckpointError, match="twice"):
        plain_state_dict({"a.weight": 1, "a.parametrizations.weight.original": 2})


def test_export_writes_what_the_model_computes_with(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 8))
    parametrizations.weight_norm(model[2])
    parametrize.register_parametrization(model[3], "weight", SmoothingView())
    guard = attach(model, targets="all", edge="dominant")
    assert "0.weight" in guard.views
    guard.views["0.weight"].open()
    model[3].parametrizations.weight[0].open()
    export(model, tmp_path / "weights.safetensors")
    loaded = load_file(tmp_path / "weights.safetensors")
    plain = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 8))
    plain.load_state_dict(loaded, strict=True)
    x = torch.randn(5, 8)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), model.eval()(x))
    assert guard.is_open
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_tied_weights_are_written_once(tmp_path):
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    export(model, tmp_path / "tied.safetensors")
    assert list(load_file(tmp_path / "tied.safetensors")) == ["0.weight"]


def test_nothing_to_write_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="no weights"):
        export(nn.ReLU(), tmp_path / "x.safetensors")
    with pytest.raises(ArgumentError, match="meta"):
        export(nn.Linear(2, 2, device="meta"), tmp_path / "x.safetensors")
