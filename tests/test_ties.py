# SPDX-License-Identifier: Apache-2.0
"""A token table that is the head as well: found however a checkpoint stores it, and repaired as a head."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import pss_param as pss
from pss_param.param_order import SCHEMA
from pss_param.ties import says_tied

WIDTH, VOCABULARY, PLACES = 24, 60, 30
DEEP = pss.RepairOptions(strength="deep")


def spoiled() -> dict[str, torch.Tensor]:
    """What a deadly rate leaves of a tiny language model: everything too large, the tables collapsed."""
    torch.manual_seed(0)
    table = 9 * (torch.randn(VOCABULARY, 2) @ torch.randn(2, WIDTH)) + torch.randn(VOCABULARY, WIDTH)
    return {
        "wte.weight": table,
        "wpe.weight": 5 * torch.randn(PLACES, WIDTH) * torch.linspace(1, 0.1, WIDTH),
        "h.0.mlp.up_proj.weight": 20 * torch.randn(WIDTH, WIDTH),
        "lm_head.weight": table,
    }


def fresh(rows: int, std: float | None = None) -> float:
    return (std or 1 / math.sqrt(3 * WIDTH)) * math.sqrt(rows * WIDTH)


def is_a_head(weight: torch.Tensor, std: float | None = None) -> bool:
    """Equal singular values at 2.4 times the norm of fresh ones."""
    values = torch.linalg.svdvals(weight)
    norm = float(torch.linalg.vector_norm(values))
    return float(values[0]) < 1.001 * float(values[-1]) and norm == pytest.approx(
        2.4 * fresh(VOCABULARY, std), rel=1e-3
    )


def test_a_tied_table_is_repaired_as_a_head_and_what_is_added_to_it_comes_along() -> None:
    before = spoiled()
    after, report = pss.repair_state_dict(before, DEEP)
    assert is_a_head(after["wte.weight"])
    assert after["lm_head.weight"] is after["wte.weight"]
    assert report.skipped["lm_head.weight"] == "shares its bytes with wte.weight, which is repaired"
    places = after["wpe.weight"]
    share = fresh(PLACES) / float(before["wpe.weight"].norm())
    assert torch.allclose(places, share * before["wpe.weight"], rtol=1e-3)
    told = {tensor.name: tensor.matrices[0] for tensor in report.tensors}["wpe.weight"]
    assert told.stable_rank[0] == pytest.approx(told.stable_rank[1], rel=1e-3)
    assert told.spectral_norm[1] == pytest.approx(share * told.spectral_norm[0], rel=1e-3)


def test_a_table_beside_a_head_of_its_own_keeps_its_norm_and_places_stay() -> None:
    before = spoiled() | {"lm_head.weight": torch.randn(VOCABULARY, WIDTH)}
    after, _ = pss.repair_state_dict(before, DEEP)
    assert after["wpe.weight"] is before["wpe.weight"]
    assert float(after["wte.weight"].norm()) == pytest.approx(float(before["wte.weight"].norm()), rel=1e-4)


def test_a_copy_of_the_table_under_the_heads_name_is_repaired_alike() -> None:
    before = spoiled()
    before["lm_head.weight"] = before["lm_head.weight"].clone()
    after, _ = pss.repair_state_dict(before, DEEP)
    assert is_a_head(after["wte.weight"])
    assert torch.equal(after["wte.weight"], after["lm_head.weight"])


def test_twice_changes_nothing_more() -> None:
    once, _ = pss.repair_state_dict(spoiled(), DEEP)
    twice, report = pss.repair_state_dict(once, DEEP)
    assert all(torch.allclose(twice[name], once[name], rtol=1e-2, atol=1e-3) for name in once)
    assert twice["wpe.weight"] is once["wpe.weight"]
    assert "wpe.weight" not in report.changed


def test_another_deep_rule_does_not_scale_the_places_alone() -> None:
    before = spoiled()
    after, _ = pss.repair_state_dict(before, pss.RepairOptions(strength="deep", edge="bulk"))
    assert after["wpe.weight"] is before["wpe.weight"]


@pytest.mark.parametrize("name", ["wte.weight", "lm_head.weight"])
def test_excluding_either_name_leaves_the_bytes_that_they_share(name: str) -> None:
    before = spoiled()
    after, report = pss.repair_state_dict(before, pss.RepairOptions(strength="deep", exclude=(name,)))
    for left in ("wte.weight", "lm_head.weight", "wpe.weight"):
        assert after[left] is before[left]
    assert report.changed == ("h.0.mlp.up_proj.weight",)
    assert "excluded" in report.skipped["lm_head.weight"]


def test_small_tables_are_not_blown_up() -> None:
    before = {name: 1e-3 * value for name, value in spoiled().items()}
    before["lm_head.weight"] = before["wte.weight"]
    after, _ = pss.repair_state_dict(before, DEEP)
    assert float(after["wte.weight"].norm()) == pytest.approx(float(before["wte.weight"].norm()), rel=1e-3)
    assert after["wpe.weight"] is before["wpe.weight"]


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, True),
        ({"architectures": ["GPT2LMHeadModel"], "tie_word_embeddings": False}, False),
        ({"architectures": ["GPT2Model"], "tie_word_embeddings": True}, False),
        ({"architectures": ["BertForMaskedLM"], "tie_word_embeddings": True}, True),
        ({"architectures": ["BertForSequenceClassification"], "tie_word_embeddings": True}, False),
        ({"architectures": ["T5ForConditionalGeneration"]}, True),
        ({"architectures": ["MyGPT"], "tie_word_embeddings": True}, True),
        ({"architectures": ["MyGPT"]}, False),
        ({"architectures": [["GPT2LMHeadModel"], True], "tie_word_embeddings": True}, False),
        ({"architectures": "GPT2LMHeadModel"}, False),
        ({"tie_word_embeddings": True}, False),
        ({}, False),
    ],
)
def test_a_config_tells_where_the_head_is_not_stored(tmp_path, config, tied) -> None:
    assert says_tied(config) == tied
    weights = {name: value.contiguous() for name, value in spoiled().items() if name != "lm_head.weight"}
    after = repaired(tmp_path, weights, config | {"vocab_size": VOCABULARY, "initializer_range": 0.02})
    assert is_a_head(after["wte.weight"], 0.02) == tied
    assert torch.equal(after["wte.weight"], weights["wte.weight"]) != tied
    assert torch.equal(after["wpe.weight"], weights["wpe.weight"]) != tied


def stored_twice() -> dict[str, torch.Tensor]:
    before = spoiled()
    return before | {"lm_head.weight": before["lm_head.weight"].clone()}


@pytest.mark.parametrize("kept", ["wte.weight", "lm_head.weight"])
def test_a_reference_may_have_one_of_two_stored_names(kept: str) -> None:
    reference = {name: value / 30 for name, value in spoiled().items() if name in {kept, "wpe.weight"} or "up" in name}
    after, report = pss.repair_state_dict(stored_twice(), pss.RepairOptions(strength="deep", reference=reference))
    assert torch.equal(after["wte.weight"], after["lm_head.weight"])
    assert {drift.name for drift in report.drift} >= {"wte.weight", "lm_head.weight"}


@pytest.mark.parametrize("name", ["wte.weight", "lm_head.weight"])
def test_excluding_one_of_two_stored_names_spares_the_other_and_the_places(name: str) -> None:
    before = stored_twice()
    _, report = pss.repair_state_dict(before, pss.RepairOptions(strength="deep", exclude=(name,)))
    assert report.changed == ("h.0.mlp.up_proj.weight",)


@pytest.mark.parametrize("mode", ["keep", "reset", "reset-all"])
def test_an_optimizer_knows_one_parameter_under_two_stored_names(tmp_path, mode: str) -> None:
    weights = {name: torch.nn.Parameter(value) for name, value in spoiled().items() if name != "lm_head.weight"}
    optimizer = torch.optim.AdamW(weights.values())
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    for weight, entry in optimizer.state.items():
        entry["master_param"] = weight.detach().clone()
    stored = {name: weight.detach() for name, weight in weights.items()}
    stored["lm_head.weight"] = stored["wte.weight"].clone()
    torch.save({"model": stored, "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    rows = [{"name": name, "shape": list(weight.shape)} for name, weight in weights.items()]
    (tmp_path / "order.json").write_text(json.dumps({"schema": SCHEMA, "parameters": rows}), encoding="utf-8")
    options = replace(DEEP, optimizer=mode, param_order=tmp_path / "order.json")
    report = pss.repair_checkpoint(tmp_path / "x.pt", tmp_path / "y.pt", options)
    after = torch.load(tmp_path / "y.pt", weights_only=True)
    states = after["optimizer"]["state"].values()
    assert torch.equal(after["model"]["wte.weight"], after["model"]["lm_head.weight"])
    for entry, name in zip(states, weights, strict=True):
        assert torch.equal(entry["master_param"], after["model"][name])
    assert len(report.optimizer.masters) == len(weights)
    assert all(bool(entry["exp_avg"].any()) == (mode == "keep") for entry in states)
    assert not pss.verify_checkpoint(tmp_path / "y.pt", tmp_path / "x.pt").problems


def test_a_head_whose_table_is_not_stored_takes_the_places_along() -> None:
    before = {name: value for name, value in spoiled().items() if name != "wte.weight"}
    after, _ = pss.repair_state_dict(before, DEEP)
    assert is_a_head(after["lm_head.weight"])
    assert float(after["wpe.weight"].norm()) == pytest.approx(fresh(PLACES), rel=1e-3)


def test_sines_and_cosines_of_places_stay() -> None:
    place, angle = torch.arange(PLACES)[:, None], 10 ** (-torch.arange(WIDTH // 2) / 6)
    before = spoiled() | {"wpe.weight": torch.cat([(place * angle).sin(), (place * angle).cos()], dim=1)}
    after, _ = pss.repair_state_dict(before, DEEP)
    assert after["wpe.weight"] is before["wpe.weight"]


def test_tables_of_another_stack_and_maps_with_a_bias_are_not_added_to_it() -> None:
    table = spoiled()["wte.weight"]
    before = {
        "decoder.embed_tokens.weight": table,
        "decoder.embed_positions.weight": 5 * torch.randn(PLACES, WIDTH),
        "encoder.embed_positions.weight": 5 * torch.randn(PLACES, WIDTH),
        "decoder.embedding_mapping.weight": 5 * torch.randn(PLACES, WIDTH),
        "decoder.embedding_mapping.bias": torch.zeros(PLACES),
        "decoder.layers.0.fc1.weight": 20 * torch.randn(WIDTH, WIDTH),
        "lm_head.weight": table,
    }
    after, _ = pss.repair_state_dict(before, DEEP)
    assert is_a_head(after["lm_head.weight"])
    assert float(after["decoder.embed_positions.weight"].norm()) == pytest.approx(fresh(PLACES), rel=1e-3)
    for name in ("encoder.embed_positions.weight", "decoder.embedding_mapping.weight"):
        assert after[name] is before[name]


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"hidden_size": WIDTH}, True),
        ({"hidden_size": 2 * WIDTH}, False),
        ({"hidden_size": 2 * WIDTH, "embedding_size": WIDTH}, True),
        ({"initializer_range": None}, False),
        ({"architectures": ["ElectraForPreTraining"]}, False),
        ({"architectures": ["BertForPreTraining"]}, True),
        ({"model_type": "switch_transformers"}, False),
        ({"vocab_size": VOCABULARY + 1}, False),
        ({"vocab_size": None, "text_config": {"vocab_size": VOCABULARY, "hidden_size": WIDTH}}, True),
        ({"text_config": {"tie_word_embeddings": False}}, False),
    ],
)
def test_a_config_has_to_tell_all_of_it(tmp_path, config, tied) -> None:
    weights = {name: value.contiguous() for name, value in spoiled().items() if name != "lm_head.weight"}
    facts = {"architectures": ["MyForCausalLM"], "vocab_size": VOCABULARY, "initializer_range": 0.02} | config
    after = repaired(tmp_path, weights, {key: value for key, value in facts.items() if value is not None})
    assert torch.equal(after["wte.weight"], weights["wte.weight"]) != tied


def write(folder, weights, config) -> None:
    """A checkpoint with a config."""
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def repaired(folder, weights, config) -> dict[str, torch.Tensor]:
    """What a deep repair makes of it."""
    write(folder / "dead", weights, config)
    pss.repair_checkpoint(folder / "dead", folder / "repaired", DEEP)
    return load_file(folder / "repaired" / "model.safetensors")


def test_a_report_is_verified_where_the_config_is_missing(tmp_path) -> None:
    weights = {name: value.contiguous() for name, value in spoiled().items() if name != "lm_head.weight"}
    facts = {"architectures": ["GPT2LMHeadModel"], "vocab_size": VOCABULARY, "initializer_range": 0.02}
    write(tmp_path / "dead", weights, facts)
    (tmp_path / "out").mkdir()
    report = pss.repair_checkpoint(tmp_path / "dead" / "model.safetensors", tmp_path / "out" / "x.safetensors", DEEP)
    assert "wte.weight" in report.changed
    assert not pss.verify_checkpoint(tmp_path / "out" / "x.safetensors").problems


@torch.no_grad()
def grown_and_repaired(model, folder) -> pss.Report:
    """Of a model of transformers, in its own files."""
    for weight in model.parameters():
        weight.mul_(30)
    model.save_pretrained(folder / "dead")
    return pss.repair_checkpoint(folder / "dead", folder / "repaired", DEEP)


def test_a_bert_whose_width_is_its_number_of_places(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, vocab_size=VOCABULARY,
        max_position_embeddings=WIDTH,
    )  # fmt: skip
    report = grown_and_repaired(transformers.BertForMaskedLM(config), tmp_path)
    places = {tensor.name: tensor for tensor in report.tensors}["bert.embeddings.position_embeddings.weight"]
    assert places.matrices[0].stable_rank[1] == pytest.approx(places.matrices[0].stable_rank[0], rel=1e-3)
    after = transformers.BertForMaskedLM.from_pretrained(tmp_path / "repaired")
    assert is_a_head(after.cls.predictions.decoder.weight.detach(), 0.02)


@pytest.mark.parametrize("tie", [True, False])
def test_transformers_own_files(tmp_path, tie) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=WIDTH, n_layer=1, n_head=2, vocab_size=VOCABULARY, n_positions=PLACES, tie_word_embeddings=tie,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    grown_and_repaired(model, tmp_path)
    after = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "repaired")
    assert is_a_head(after.lm_head.weight.detach(), 0.02)
    assert (after.lm_head.weight is after.transformer.wte.weight) == tie
    assert is_a_head(after.transformer.wte.weight.detach(), 0.02) == tie
    tokens = torch.arange(PLACES)[None]
    with torch.no_grad():
        assert float(after(tokens, labels=tokens).loss) < 1.1 * math.log(VOCABULARY)
        assert float(model(tokens, labels=tokens).loss) > 3 * math.log(VOCABULARY)
