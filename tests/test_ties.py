# SPDX-License-Identifier: Apache-2.0
"""A token table that is the head as well: found however a checkpoint stores it, and repaired as a head."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import pss_param as pss
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
    dead, repaired = tmp_path / "dead", tmp_path / "repaired"
    dead.mkdir()
    save_file(weights, dead / "model.safetensors")
    facts = config | {"vocab_size": VOCABULARY, "initializer_range": 0.02}
    (dead / "config.json").write_text(json.dumps(facts), encoding="utf-8")
    pss.repair_checkpoint(dead, repaired, DEEP)
    after = load_file(repaired / "model.safetensors")
    assert is_a_head(after["wte.weight"], 0.02) == tied
    assert torch.equal(after["wte.weight"], weights["wte.weight"]) != tied
    assert torch.equal(after["wpe.weight"], weights["wpe.weight"]) != tied


@pytest.mark.parametrize("tie", [True, False])
def test_transformers_own_files(tmp_path, tie) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=WIDTH, n_layer=1, n_head=2, vocab_size=VOCABULARY, n_positions=PLACES, tie_word_embeddings=tie,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(30)
    model.save_pretrained(tmp_path / "dead")
    pss.repair_checkpoint(tmp_path / "dead", tmp_path / "repaired", DEEP)
    after = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "repaired")
    assert is_a_head(after.lm_head.weight.detach(), 0.02)
    assert (after.lm_head.weight is after.transformer.wte.weight) == tie
    assert is_a_head(after.transformer.wte.weight.detach(), 0.02) == tie
    tokens = torch.arange(PLACES)[None]
    with torch.no_grad():
        assert float(after(tokens, labels=tokens).loss) < 1.1 * math.log(VOCABULARY)
        assert float(model(tokens, labels=tokens).loss) > 3 * math.log(VOCABULARY)
