# SPDX-License-Identifier: Apache-2.0
"""A healthy reference: restoring non-finite tensors, limiting the repair to what drifted, comparing, verifying."""

import json

import pytest
import torch
from pss_param.cli.main import run
from safetensors.torch import load_file, save_file

from pss_param.compare import compare_checkpoints
from pss_param.errors import ArgumentError, CheckpointError, NonFiniteError
from pss_param.options import RepairOptions
from pss_param.repair import repair_checkpoint
from pss_param.report import Report, report_path
from pss_param.scan import scan_checkpoint
from pss_param.verification import verify_checkpoint

UP, NORM = "model.layers.{}.mlp.up_proj.weight", "model.norm.weight"


def healthy():
    return {UP.format(i): torch.randn(64, 48) / 7 for i in range(3)} | {NORM: torch.ones(48)}


@pytest.fixture
def pair(tmp_path):
    """A good checkpoint, and one of bfloat16 with NaN, infinity and one collapsed matrix."""
    good = healthy()
    bad = {name: value.bfloat16() for name, value in good.items()}
    bad[UP.format(0)] += torch.ones(64, 48)
    bad[UP.format(1)][2, 3] = float("nan")
    bad[NORM][5:7] = float("inf")
    torch.save({"model": {f"module.{name}": value for name, value in good.items()}}, tmp_path / "good.pt")
    save_file(bad, tmp_path / "bad.safetensors")
    return tmp_path / "good.pt", tmp_path / "bad.safetensors"


def test_non_finite_tensors_are_taken_from_a_reference_of_another_format(pair):
    good, bad = pair
    with pytest.raises(NonFiniteError, match=r"norm.weight \(2\)"):
        repair_checkpoint(bad, options=RepairOptions(reference=good))
    report = repair_checkpoint(bad, options=RepairOptions(strength="gentle", reference=good, nonfinite="reference"))
    assert {name: found.nonfinite for name, found in report.restored.items()} == {UP.format(1): 1, NORM: 2}
    old, new = torch.load(good, weights_only=True)["model"], load_file(report.output)
    for name in report.restored:
        assert torch.equal(new[name], old[f"module.{name}"].bfloat16())
        assert "taken from the reference" in report.skipped[name]
    assert report.changed == (UP.format(0),)
    assert Report.from_json(report_path(bad.with_name("bad.repaired.safetensors")).read_text()) == report
    assert not verify_checkpoint(report.output, bad).problems


def test_a_reference_that_is_sick_or_lacks_a_tensor_is_refused(pair, tmp_path):
    _, bad = pair
    with pytest.raises(NonFiniteError, match="the reference has 1"):
        repair_checkpoint(bad, options=RepairOptions(reference=bad, nonfinite="reference"))
    save_file({NORM: torch.ones(48)}, tmp_path / "less")
    with pytest.raises(ArgumentError, match="same model"):
        repair_checkpoint(bad, options=RepairOptions(reference=tmp_path / "less", nonfinite="reference"))


def test_only_what_drifted_is_repaired(pair):
    good, bad = pair
    options = RepairOptions(reference=good, nonfinite="reference", where="drifted")
    report = repair_checkpoint(bad, options=options)
    assert report.changed == (UP.format(0),)
    assert "not below 0.5" in report.skipped[UP.format(2)]
    drift = {row.name: row for row in report.drift}
    assert drift.keys() == {UP.format(0), UP.format(2)}
    assert drift[UP.format(0)].worst.ratio < 0.5 < drift[UP.format(2)].worst.ratio
    a, b = load_file(bad)[UP.format(0)].double(), torch.load(good)["model"]["module." + UP.format(0)].double()
    assert drift[UP.format(0)].distance == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-6)


def test_scan_and_compare_tell_the_same_drift(pair):
    good, bad = pair
    scanned = scan_checkpoint(bad, RepairOptions(reference=good))
    compared = compare_checkpoints(good, bad)
    assert scanned.drift == compared.rows
    assert compared.nonfinite == {UP.format(1): (0, 1), NORM: (0, 2)}
    content = json.loads(compared.to_json())
    assert list(content) == [
        "schema", "version", "sources", "formats", "rows", "others", "identical", "missing", "unlike", "nonfinite"
    ]  # fmt: skip


def test_compare_names_what_cannot_be_compared(tmp_path):
    save_file({"a": torch.ones(3), "b": torch.ones(2), UP.format(0): torch.eye(8)}, tmp_path / "one")
    save_file({"a": torch.ones(4), "c": torch.ones(2), UP.format(0): torch.eye(8)}, tmp_path / "two")
    report = compare_checkpoints(tmp_path / "one", tmp_path / "two")
    assert report.missing == (("b",), ("c",))
    assert "shape" in report.unlike["a"]
    assert report.identical == 1


@pytest.mark.parametrize("prefix", ["model.", "net.", "_orig_mod.model.", "transformer.inner."])
def test_a_prefix_before_all_names_of_one_side_is_seen_through(tmp_path, prefix):
    plain = {f"layers.{i}.mlp.up_proj.weight": torch.randn(64, 48) for i in range(3)} | {"norm.weight": torch.ones(4)}
    torch.save({"state_dict": {prefix + name: value for name, value in plain.items()}}, tmp_path / "run.ckpt")
    save_file(plain, tmp_path / "plain.safetensors")
    pair = tmp_path / "run.ckpt", tmp_path / "plain.safetensors"
    for one, other in (pair, pair[::-1]):
        report = compare_checkpoints(one, other)
        assert (len(report.rows), report.identical, report.missing) == (3, 4, ((), ()))
        assert len(scan_checkpoint(one, RepairOptions(reference=other)).drift) == 3


def test_a_part_of_the_other_model_is_found_in_it(tmp_path):
    inner = {f"h.{i}.mlp.up_proj.weight": torch.randn(64, 48) for i in range(3)}
    save_file(inner, tmp_path / "inner")
    save_file({f"transformer.{n}": w for n, w in inner.items()} | {"lm_head.bias": torch.ones(4)}, tmp_path / "whole")
    report = compare_checkpoints(tmp_path / "inner", tmp_path / "whole")
    assert (report.identical, report.missing) == (3, ((), ("lm_head.bias",)))


def test_nothing_in_common_and_two_models_in_one_file_are_refused(tmp_path):
    save_file({UP.format(0): torch.eye(8)}, tmp_path / "one")
    save_file({"fc.weight": torch.eye(8)}, tmp_path / "two")
    save_file({f"{who}.{UP.format(0)}": torch.eye(8) for who in ("student", "teacher")}, tmp_path / "both")
    for other, words in (("two", "no tensor in common"), ("both", "'student.' and under 'teacher.'")):
        with pytest.raises(ArgumentError, match=words):
            compare_checkpoints(tmp_path / "one", tmp_path / other)
        with pytest.raises(ArgumentError, match=words):
            scan_checkpoint(tmp_path / "one", RepairOptions(reference=tmp_path / other))


def test_verify_finds_every_kind_of_change(pair, tmp_path):
    good, bad = pair
    options = RepairOptions(strength="gentle", reference=good, nonfinite="reference")
    report = repair_checkpoint(bad, tmp_path / "out", options)
    assert not verify_checkpoint(tmp_path / "out", bad).problems
    original = load_file(tmp_path / "out")
    for name, words in (
        (UP.format(0), "other bytes"),
        (NORM, "other bytes"),
        (UP.format(2), "differs from the source"),
    ):
        changed = {key: value.clone() for key, value in original.items()}
        changed[name].view(-1)[0] += 1
        save_file(changed, tmp_path / "out")
        assert any(words in problem for problem in verify_checkpoint(tmp_path / "out", bad).problems), name
    sidecar = report_path(tmp_path / "out")
    for text in ("{", "[]", json.dumps({"schema": "other"}), json.dumps({"schema": report.schema})):
        sidecar.write_text(text)
        with pytest.raises(CheckpointError, match="usable report"):
            verify_checkpoint(tmp_path / "out")
    sidecar.unlink()
    with pytest.raises(CheckpointError, match="is not there"):
        verify_checkpoint(tmp_path / "out")


def test_verify_without_an_output_and_with_another_source_says_so(pair, tmp_path, capsys):
    good, bad = pair
    report = repair_checkpoint(good, tmp_path / "out", RepairOptions(strength="deep"))
    (tmp_path / "moved.pt").write_bytes(good.read_bytes())
    assert not verify_checkpoint(tmp_path / "out", tmp_path / "moved.pt").problems
    (tmp_path / "folder").mkdir()
    save_file(healthy(), tmp_path / "folder" / "model.safetensors")
    for wrong in (bad, tmp_path / "folder"):
        outcome = verify_checkpoint(tmp_path / "out", wrong)
        assert (outcome.wrong_source, outcome.origin) == (True, str(good))
        assert run(["verify", str(tmp_path / "out"), "--source", str(wrong)]) == 1
        assert f"{wrong} is not the source of {tmp_path / 'out'}, its report names {good}" in capsys.readouterr().err
    assert run(["verify", str(tmp_path / "nothere")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'nothere'} does not exist; check the path\n"
    # An output that is damaged itself is that first, whatever it is compared with.
    weights = torch.load(tmp_path / "out", weights_only=True)
    weights["model"][report.changed[0]][0] = 0
    torch.save(weights, tmp_path / "out")
    assert not verify_checkpoint(tmp_path / "out", bad).wrong_source


def test_the_refusal_of_nan_names_the_ways_out(pair):
    _, bad = pair
    with pytest.raises(NonFiniteError, match="--nonfinite reference --reference GOOD, or --exclude"):
        repair_checkpoint(bad)
