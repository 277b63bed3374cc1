# SPDX-License-Identifier: Apache-2.0
"""Weights opened at once find their directions together; for GPUs, and tried here as if a CPU were one."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import pss_param as pss
from pss_param import together


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 24, bias=False) for _ in range(4))
        self.wide = nn.Linear(24, 48, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.wide(x)


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pss_param.opening.may_join", lambda weight, smoothing: smoothing.shape != "equal")


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many matrices each decomposition got."""
    seen: list[int] = []
    original = together.factors_together

    def counted(parts: Any, *rest: Any) -> Any:
        seen.append(len(parts))
        return original(parts, *rest)

    monkeypatch.setattr(together, "factors_together", counted)
    return seen


def spiked(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for i, weight in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(i)
            m, n = weight.shape
            weight += torch.outer(torch.randn(m, generator=generator), torch.randn(n, generator=generator)) * (i + 1)
    return model


def opened(**options: Any) -> tuple[nn.Module, pss.Guard]:
    torch.manual_seed(0)
    model = spiked(Network())
    guard = pss.attach(model, targets="all", detector=pss.GradientNormRatio(), **options)
    guard._open(list(guard.views.values()))
    return model, guard


def test_the_first_read_finds_the_directions_of_all_in_one_batch(batches: list[int]) -> None:
    model, guard = opened()
    assert batches == []
    model(torch.ones(2, 24))
    assert batches == [5]
    guard.fold()
    assert batches == [5]


def test_the_result_is_that_of_each_weight_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = opened()
    monkeypatch.setattr("pss_param.opening.may_join", lambda weight, smoothing: False)
    alone, _ = opened()
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_a_read_and_a_fold_have_the_same_bits(batches: list[int]) -> None:
    model, guard = opened()
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    shown = [layer.weight.detach().clone() for layer in model.layers]
    guard.fold()
    assert batches == [5]  # also for those that were not read before the others were folded
    assert all(torch.equal(saved[f"layers.{i}.weight"], value) for i, value in enumerate(shown))
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("way", ["in place", "data", "fused"])
def test_weights_that_move_before_the_first_read_are_decomposed_anew(way: str, batches: list[int]) -> None:
    model, guard = opened()
    model.state_dict()
    weights = [layer.parametrizations.weight.original for layer in model.layers]
    if way == "fused":  # which leaves the versions of tensors as they are
        optimizer = torch.optim.SGD(weights, lr=1.0, fused=True)
        for weight in weights:
            weight.grad = -weight.detach()
        optimizer.step()
    elif way == "data":
        for weight in weights:
            weight.data.copy_(2 * weight.data)
    else:
        with torch.no_grad():
            for weight in weights:
                weight.mul_(2)
    before = [float(torch.linalg.matrix_norm(weight.detach(), 2)) for weight in weights]
    model(torch.ones(2, 24))
    assert batches == [5, 5]
    guard.fold()
    for layer, old in zip(model.layers, before, strict=True):
        assert float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) < 0.9 * old


def test_each_weight_has_its_own_fresh_size() -> None:
    model = spiked(Network())
    guard = pss.attach(model, targets="all", edge="init")
    views = list(guard.views.values())
    for view, std in zip(views, (0.02, 0.002, 0.02, 0.002, 0.02), strict=True):
        view.smoothing = replace(view.smoothing, init_std=std)
    guard._open(views)
    for view in views:  # as a detector that has measured them passes what it knows
        view.levels = (torch.tensor(1.0),)
    for layer, std in zip(model.layers, (0.02, 0.002, 0.02, 0.002), strict=True):
        norm = float(torch.linalg.matrix_norm(layer.weight.detach(), 2))
        assert norm == pytest.approx(2 * 24**0.5 * std, rel=0.05)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, pss.NonFiniteError])
def test_what_cannot_be_found_together_is_found_one_by_one(error: type, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        raise error("no")

    monkeypatch.setattr(together, "factors_together", fails)
    model, guard = opened()
    before = float(torch.linalg.matrix_norm(model.layers[1].parametrizations.weight.original.detach(), 2))
    model(torch.ones(2, 24))
    guard.fold()
    assert float(torch.linalg.matrix_norm(model.layers[1].weight.detach(), 2)) < 0.9 * before


def test_callable_edges_see_one_weight_at_a_time() -> None:
    weight = torch.ones(3, 3)
    assert not together.may_join(weight, pss.Smoothing(edge=lambda W: W.norm()))


def test_large_groups_are_cut(batches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "_MOST_ELEMENTS", 3 * 24 * 24)
    model, _ = opened()
    model(torch.ones(2, 24))
    assert batches == [3, 2]


def test_whole_matrix_shapes_are_left_out(batches: list[int]) -> None:
    model, guard = opened(smoothing="equal")
    model(torch.ones(2, 24))
    guard.fold()
    assert batches == []


def test_a_weight_that_is_not_finite_is_named() -> None:
    model, _ = opened()
    with torch.no_grad():
        model.layers[2].parametrizations.weight.original[0, 0] = torch.nan
    model.layers[0].weight  # noqa: B018
    with pytest.raises(pss.NonFiniteError, match=r"layers\.2\.weight"):
        model(torch.ones(2, 24))


def test_a_copy_of_a_layer_does_not_drag_the_others_along() -> None:
    model, _ = opened()
    layer = copy.deepcopy(model.layers[0])
    assert layer.parametrizations.weight[0].together is None
    torch.testing.assert_close(layer.weight, model.layers[0].weight, rtol=1e-4, atol=1e-5)


def test_levels_of_a_live_run_are_each_weights_own() -> None:
    model = Network()
    guard = pss.attach(model, targets="all")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.ones(2, 24)).square().mean().backward()
        guard.step()
        optimizer.step()
    levels = {name: float(torch.linalg.matrix_norm(w.detach(), 2)) for name, w in model.named_parameters()}
    spiked(model)
    with guard.preview(), torch.no_grad():
        for name, shown in (("layers.1.weight", model.layers[1].weight), ("layers.3.weight", model.layers[3].weight)):
            assert float(torch.linalg.matrix_norm(shown, 2)) == pytest.approx(levels[name], rel=0.1)


def test_a_bfloat16_weight_that_moves_a_little_is_decomposed_anew(batches: list[int]) -> None:
    torch.manual_seed(0)
    model = spiked(Network()).bfloat16()
    guard = pss.attach(model, targets="all", detector=pss.GradientNormRatio())
    guard._open(list(guard.views.values()))
    model.state_dict()
    norms = [weight.detach().norm() for weight in model.parameters()]
    with torch.no_grad():
        for weight in model.parameters():
            weight.view(-1)[:8] *= 1.05
    assert any(torch.equal(weight.detach().norm(), old) for weight, old in zip(model.parameters(), norms, strict=True))
    model(torch.ones(2, 24, dtype=torch.bfloat16))
    assert batches == [5, 5]
