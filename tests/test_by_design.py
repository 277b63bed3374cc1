# SPDX-License-Identifier: Apache-2.0
"""A mask's infinities are no damage, a diverged weight's are; what is excluded blocks nothing."""

import pytest
import torch
from pss_param.cli.main import run
from safetensors.torch import load_file, save_file

from pss_param.compare import compare_checkpoints
from pss_param.errors import NonFiniteError
from pss_param.options import RepairOptions
from pss_param.repair import repair_checkpoint, repair_state_dict
from pss_param.report import Report, report_path
from pss_param.scan import scan_checkpoint
from pss_param.verification import verify_checkpoint

INF = float("inf")
UP, MASK, NORM, BARE = "layers.0.mlp.up_proj.weight", "layers.0.mask", "norm.weight", "layers.0.positions"


def causal(side=16):
    return torch.triu(torch.full((side, side), -INF), 1)


def network(**others):
    generator = torch.Generator().manual_seed(0)
    weights = {f"layers.{i}.mlp.up_proj.weight": torch.randn(64, 48, generator=generator) / 7 for i in range(3)}
    weights[UP] = weights[UP] + torch.ones(64, 48)
    return weights | {MASK: causal(), NORM: torch.ones(48)} | others


@pytest.fixture
def path(tmp_path):
    save_file(network(), tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def test_a_mask_is_noted_and_copied_as_it_is(path, tmp_path, capsys):
    report = repair_checkpoint(path, tmp_path / "out")
    assert UP in report.changed
    assert "by design" in report.skipped[MASK]
    assert any(MASK in note for note in report.notes)
    assert torch.equal(load_file(tmp_path / "out")[MASK], causal())
    assert Report.from_json(report_path(tmp_path / "out").read_text()) == report
    assert not verify_checkpoint(tmp_path / "out", path).problems
    assert run([str(path), "--dry-run"]) == 0
    assert report.notes[0] in capsys.readouterr().err


def test_scan_does_not_call_a_mask_damage(path, capsys):
    report = scan_checkpoint(path)
    assert (report.damaged, report.nonfinite) == (False, {})
    assert "by design" in report.skipped[MASK]
    assert run(["scan", str(path)]) == 0
    assert MASK in capsys.readouterr().err


@pytest.mark.parametrize("strength", ["gentle", "deep"])
def test_a_reference_with_the_same_mask_is_no_obstacle(path, tmp_path, strength):
    save_file(network(**{UP: torch.full((64, 48), float("nan"))}), tmp_path / "bad")
    options = RepairOptions(strength=strength, reference=path, nonfinite="reference")
    report = repair_checkpoint(tmp_path / "bad", options=options)
    assert report.restored.keys() == {UP}
    assert torch.equal(load_file(report.output)[MASK], causal())


@pytest.mark.parametrize(
    "mask",
    [
        causal().half(),
        causal()[None, None],
        -causal(),
        causal().t(),
        1.0 + causal(),
        torch.tensor(INF),
        torch.full((3,), -INF, dtype=torch.bfloat16),
    ],
)
def test_what_looks_like_a_constant(mask):
    repaired, report = repair_state_dict(network(**{MASK: mask}))
    assert repaired[MASK] is mask
    assert "by design" in report.skipped[MASK]


def spoiled(value, *bad):
    value = value.clone()
    value.view(-1)[: len(bad)] = torch.tensor(bad)
    return value


@pytest.mark.parametrize("strength", ["gentle", "deep"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        (UP, spoiled(torch.ones(64, 48), INF)),  # a target, though it has two values
        (NORM, spoiled(torch.ones(48), INF, INF)),
        ("layers.0.mlp.up_proj.bias", spoiled(torch.zeros(64), -INF)),
        ("embed_tokens.weight", spoiled(torch.zeros(32, 16), INF)),
        ("lm_head.weight", torch.full((32, 48), INF)),
        ("pos_emb", spoiled(torch.zeros(1, 8, 48), INF)),
        ("bn.running_var", torch.full((8,), INF)),
        ("logit_scale", torch.tensor(INF)),
        ("layers.0.attn.q_proj", spoiled(torch.zeros(4, 8, 8), INF)),
        (BARE, spoiled(torch.randn(8, 8), INF)),
        (BARE, torch.tensor([INF, -INF, INF])),
        (MASK, spoiled(causal(), float("nan"))),
        (MASK, torch.tensor([INF, float("nan")])),
        (MASK, spoiled(causal(), 3.0)),
    ],
)
def test_what_a_diverged_run_leaves_is_still_refused(tmp_path, name, value, strength):
    weights = network(**{name: value})
    with pytest.raises(NonFiniteError, match=rf"{name} \("):
        repair_state_dict(weights, RepairOptions(strength=strength))
    save_file({key: entry.clone() for key, entry in weights.items()}, tmp_path / "x")
    assert name in scan_checkpoint(tmp_path / "x").nonfinite


def test_what_is_excluded_blocks_nothing_and_is_copied(tmp_path, capsys):
    broken = {"layers.2.mlp.up_proj.weight": torch.full((64, 48), float("nan")), NORM: spoiled(torch.ones(48), INF)}
    path = tmp_path / "x.safetensors"
    save_file(network(**broken), path)
    exclude = ("layers.2", NORM)
    for given in ({}, {"nonfinite": "reference", "reference": network()}, {"strength": "deep"}):
        report = repair_checkpoint(path, tmp_path / "out", RepairOptions(exclude=exclude, **given), force=True)
        assert report.restored == {}
        assert report.skipped[NORM] == "excluded by 'norm.weight', and left as it is: 1 NaN or infinite value(s)"
        new = load_file(tmp_path / "out")
        assert all(new[name].view(torch.int32).equal(value.view(torch.int32)) for name, value in broken.items())
    assert "2 excluded tensors hold NaN or infinity" in report.notes[1]
    arguments = ["scan", str(path), "--exclude", "layers.2", "--exclude", NORM]
    assert run(arguments) == 0
    assert "2 excluded" in capsys.readouterr().err
    assert run(arguments[:-2]) == 3


def test_equal_masks_are_equal_to_a_comparison_and_others_are_named(path, tmp_path):
    save_file(network(), tmp_path / "same")
    assert compare_checkpoints(path, tmp_path / "same").nonfinite == {}
    save_file(network(**{MASK: causal().t().contiguous()}), tmp_path / "other")
    assert compare_checkpoints(path, tmp_path / "other").nonfinite == {MASK: (120, 120)}
