# SPDX-License-Identifier: Apache-2.0
"""A deep repair: everything a deadly learning rate spoils, in memory and on disk, and nothing else."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import pss_param as pss
from pss_param.vectors import initial_value

WIDTH = 24


def spoiled() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    blow = torch.outer(torch.randn(WIDTH), torch.randn(WIDTH))
    return {
        "token_embedding.weight": 9 * torch.randn(50, WIDTH),
        "position_embedding.weight": 9 * torch.randn(30, WIDTH),
        "stem.weight": 40 * torch.randn(WIDTH, 10),
        "stem.bias": torch.randn(WIDTH),
        "characters.weight": 9 * torch.randn(50, WIDTH),
        "patches.weight": 40 * torch.randn(WIDTH, 1, 3, 3),
        "layers.0.mlp.up_proj.weight": torch.randn(WIDTH, WIDTH) + blow,
        "layers.0.mlp.up_proj.bias": 5 * torch.randn(WIDTH),
        "layers.0.input_layernorm.weight": 7 * torch.rand(WIDTH),
        "layers.0.input_layernorm.bias": torch.randn(WIDTH),
        "layers.0.bn1.running_mean": torch.randn(WIDTH),
        "head.weight": 30 * torch.randn(50, WIDTH),
        "head.bias": torch.randn(50),
        "step": torch.tensor(3),
    }


def fresh_norm(m: int, n: int) -> float:
    return (math.sqrt(m) + math.sqrt(n)) / math.sqrt(3 * n)


def test_a_deep_repair_undoes_shape_scale_norms_and_biases():
    before = spoiled()
    after, report = pss.repair_state_dict(before, pss.RepairOptions(strength="deep"))
    values = torch.linalg.svdvals(after["layers.0.mlp.up_proj.weight"])
    assert values.max() == pytest.approx(float(values.min()), rel=1e-3)
    assert float(values.square().sum()) == pytest.approx(1.2**2 * WIDTH / 3, rel=1e-3)  # m n std^2, std^2 = 1 / (3 n)
    for name in ("stem.weight", "head.weight"):
        values = torch.linalg.svdvals(after[name])
        assert values.max() == pytest.approx(float(values.min()), rel=1e-3)
        assert float(values.square().sum()) == pytest.approx(2.4**2 * after[name].shape[0] / 3, rel=1e-3)
    values = torch.linalg.svdvals(after["token_embedding.weight"])  # as many rows as the head has outputs
    assert values.max() == pytest.approx(float(values.min()), rel=1e-3)
    assert float(values.norm()) == pytest.approx(float(before["token_embedding.weight"].norm()), rel=1e-4)
    patches = after["patches.weight"].flatten(1)
    assert float(pss.spectral_norm(patches)) == pytest.approx(2 * fresh_norm(*patches.shape), rel=1e-2)
    assert torch.equal(after["layers.0.input_layernorm.weight"], torch.ones(WIDTH))
    for name in ("layers.0.mlp.up_proj.bias", "layers.0.input_layernorm.bias", "stem.bias", "head.bias"):
        assert not after[name].any()
    for name in ("position_embedding.weight", "characters.weight", "layers.0.bn1.running_mean", "step"):
        assert after[name] is before[name]
    assert set(report.vectors) == {name for name in before if name.endswith(("bias", "layernorm.weight"))}
    named = [*(tensor.name for tensor in report.tensors), *report.vectors, *report.skipped]
    assert sorted(named) == sorted(before)


def test_a_gentle_repair_leaves_vectors_and_heads_alone():
    before = spoiled()
    after, report = pss.repair_state_dict(before, pss.RepairOptions(strength="gentle"))
    assert report.changed == ("layers.0.mlp.up_proj.weight",)
    assert [name for name in before if after[name] is not before[name]] == ["layers.0.mlp.up_proj.weight"]
    assert not report.vectors


def test_a_deep_repair_on_disk_is_the_one_in_memory_and_verifies(tmp_path):
    before = {name: value for name, value in spoiled().items() if name != "step"}
    save_file(before, tmp_path / "dead.safetensors")
    options = pss.RepairOptions(strength="deep")
    report = pss.repair_checkpoint(tmp_path / "dead.safetensors", tmp_path / "out.safetensors", options)
    expected, _ = pss.repair_state_dict(before, options)
    written = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(written[name], expected[name]) for name in before)
    content = json.loads((tmp_path / "out.safetensors.pss.json").read_text())
    assert (content["options"]["smoothing"], content["options"]["edge"]) == ("equal", "init")
    assert set(content["vectors"]) == set(report.vectors)
    assert not pss.verify_checkpoint(tmp_path / "out.safetensors", tmp_path / "dead.safetensors").problems
    written["head.bias"][0] = 1.0
    save_file(written, tmp_path / "out.safetensors")
    assert "head.bias" in pss.verify_checkpoint(tmp_path / "out.safetensors").problems[0]


def test_a_deep_repair_twice_changes_nothing_more():
    options = pss.RepairOptions(strength="deep")
    once, _ = pss.repair_state_dict(spoiled(), options)
    twice, _ = pss.repair_state_dict(once, options)
    for name, value in once.items():
        assert torch.allclose(value.double(), twice[name].double(), rtol=1e-2, atol=2e-3)


def test_excluded_vectors_stay():
    before = spoiled()
    after, _ = pss.repair_state_dict(before, pss.RepairOptions(strength="deep", exclude=("head",)))
    assert after["head.bias"] is before["head.bias"]
    assert after["head.weight"] is before["head.weight"]


@pytest.mark.parametrize("wrong", [{"targets": "qk"}, {"where": "drifted", "reference": {}}])
def test_a_deep_repair_of_a_part_is_refused(wrong):
    with pytest.raises(pss.ArgumentError, match="whole model"):
        pss.RepairOptions(strength="deep", **wrong)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("module.h.0.ln_1.weight", 1.0),
        ("encoder.layer.0.output.LayerNorm.gamma", 1.0),
        ("rnn.bias_ih_l0", 0.0),
        ("layers.0.attn.in_proj_bias", 0.0),
        ("blocks.0.ls1.gamma", None),
        ("layers.0.mixer.A_log", None),
        ("layers.0.mixer.dt_bias", None),
        ("layers.0.mixer.dt_proj.bias", None),
        ("rotary.inv_freq", None),
    ],
)
def test_what_a_name_says(name, value):
    assert initial_value(name, (8,)) == value


def test_a_norm_in_a_sequential_is_told_by_its_bias():
    shapes = {"downsample.1.weight": (8,), "downsample.1.bias": (8,), "gate.2.weight": (8,), "act.weight": (1,)}
    shapes |= {"gate.2.bias": (4,)}
    assert initial_value("downsample.1.weight", (8,), None, shapes) == 1.0
    assert initial_value("downsample.1.weight", (8,)) is None
    assert initial_value("gate.2.weight", (8,), None, shapes) is None
    assert initial_value("act.weight", (1,), None, shapes) is None
    assert initial_value("downsample.1.weight", (8,), {"model_type": "gemma2"}, shapes) is None


@pytest.mark.parametrize("numbered", [True, False])
def test_a_deep_repair_resets_norms_in_a_sequential(numbered):
    layer = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.LayerNorm(16))
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])} if numbered else {"net": layer})
    before = {name: value + 5 if value.dim() == 1 else value for name, value in model.state_dict().items()}
    after, _ = pss.repair_state_dict(before, pss.RepairOptions(strength="deep"))
    stem = "layers.0.1" if numbered else "net.1"
    assert torch.equal(after[f"{stem}.weight"], torch.ones(16))
    assert not after[f"{stem}.bias"].any()


@pytest.mark.parametrize(
    "config",
    [{"model_type": "gemma2"}, {"model_type": "qwen3_next"}, {"model_type": "paligemma"},
     {"model_type": "any", "text_config": {"model_type": "gemma3_text"}}],
)  # fmt: skip
def test_gains_that_may_be_stored_less_one_stay(config):
    assert initial_value("model.norm.weight", (8,), config) is None
    assert initial_value("model.layers.0.mlp.up_proj.bias", (8,), config) == 0.0
    assert initial_value("model.norm.weight", (8,), {"model_type": "llama", "quantization_config": {}}) == 1.0


@pytest.mark.parametrize(
    ("name", "shape"),
    [("cls_token", (1, 1, WIDTH)), ("pos_embed", (5, 1, WIDTH)), ("layers.0.attn.bias", (1, 1, 8, 8)),
     ("odd.weight", (1, 1, 3, 3)), ("layers[0].conv1d.weight", (WIDTH, 1, 3))],
)  # fmt: skip
def test_tensors_with_a_side_of_one_are_no_obstacle(name, shape):
    before = {**spoiled(), name: torch.randn(shape)}
    after, report = pss.repair_state_dict(before, pss.RepairOptions(strength="deep"))
    assert (after[name] is before[name]) == (name != "layers[0].conv1d.weight")
    assert {*(tensor.name for tensor in report.tensors), *report.vectors, *report.skipped} == set(before)


def test_an_excluded_kernel_is_left_alone():
    options = pss.RepairOptions(strength="deep", exclude=("patches", "*.up_proj.bias"))
    after, report = pss.repair_state_dict(before := spoiled(), options)
    for name in ("patches.weight", "layers.0.mlp.up_proj.bias"):
        assert after[name] is before[name]
        assert "excluded by" in report.skipped[name]


@pytest.mark.parametrize("table", ["token_embedding.weight", "characters.weight"])
def test_a_table_that_is_a_head_too_is_a_head(table):
    before = spoiled()
    before["head.weight"] = before[table]
    after, _ = pss.repair_state_dict(before, pss.RepairOptions(strength="deep"))
    assert after["head.weight"] is after[table]
    values = torch.linalg.svdvals(after[table])
    assert float(values.square().sum()) == pytest.approx(2.4**2 * after[table].shape[0] / 3, rel=1e-3)


def test_shared_vectors_are_reset_once_and_named_once():
    before = spoiled()
    before = {"odd.offset": before["head.bias"], **before, "other.bias": before["head.bias"]}
    after, report = pss.repair_state_dict(before, pss.RepairOptions(strength="deep"))
    assert after["odd.offset"] is after["head.bias"] is after["other.bias"]
    assert not after["head.bias"].any()
    for name in ("odd.offset", "other.bias"):
        assert report.skipped[name] == "shares its bytes with head.bias, which is repaired"


def test_a_vector_at_its_initial_value_is_not_touched():
    before = {**spoiled(), "norm.weight": torch.ones(WIDTH)}
    after, report = pss.repair_state_dict(before, pss.RepairOptions(strength="deep"))
    assert after["norm.weight"] is before["norm.weight"]
    assert report.skipped["norm.weight"] == "is at its initial value"


def test_naming_the_defaults_of_a_deep_repair_changes_nothing():
    plain, named = (
        pss.repair_state_dict(spoiled(), options)[0]
        for options in (
            pss.RepairOptions(strength="deep"),
            pss.RepairOptions(strength="deep", edge="init", smoothing="equal"),
        )
    )
    half = pss.repair_state_dict(spoiled(), pss.RepairOptions(strength="deep", edge="init"))[0]
    assert all(torch.equal(plain[name], named[name]) and torch.equal(plain[name], half[name]) for name in plain)
