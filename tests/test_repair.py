# SPDX-License-Identifier: Apache-2.0
"""Offline repair of a safetensors file and of a state dict: what changes, what must not, what is refused."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from pss_param.checkpoint import Editor, open_checkpoint
from pss_param.errors import ArgumentError, CheckpointError, NonFiniteError
from pss_param.repair import RepairOptions, default_output, repair_checkpoint, repair_state_dict
from pss_param.report import Report, report_path

SICK = "model.layers.0.mlp.up_proj.weight"


def sick_matrix(m, n, dtype=torch.float32, seed=0):
    """A fresh matrix plus one direction five times as strong as the rest."""
    source = torch.Generator().manual_seed(seed)
    bulk = torch.randn(m, n, generator=source) / n**0.5
    u, v = torch.randn(m, 1, generator=source), torch.randn(1, n, generator=source)
    return (bulk + 10 * u @ v / (u.norm() * v.norm())).to(dtype)


def tiny(dtype=torch.float32):
    tensors = {
        "model.embed_tokens.weight": torch.randn(50, 48).to(dtype),
        "position_ids": torch.arange(9)[None],
    }
    for layer in range(2):
        stem = f"model.layers.{layer}"
        for name, (m, n) in {
            "self_attn.q_proj": (48, 48),
            "mlp.up_proj": (96, 48),
            "mlp.down_proj": (48, 96),
        }.items():
            tensors[f"{stem}.{name}.weight"] = sick_matrix(m, n, dtype, layer)
        tensors[f"{stem}.input_layernorm.weight"] = torch.ones(48, dtype=dtype)
    return tensors


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(tiny(), path, metadata={"format": "pt", "note": "ü"})
    path.chmod(0o640)
    return path


def spans(path):
    """SHA-256 of the header's bytes and of every tensor's raw bytes."""
    data = path.read_bytes()
    with open_checkpoint(path) as layout:
        found = {"": hashlib.sha256(data[: layout.header.data]).hexdigest()}
        for name, entry in layout.header.entries.items():
            start = layout.header.data
            found[name] = hashlib.sha256(data[start + entry.begin : start + entry.end]).hexdigest()
    return found


def test_only_the_repaired_spans_differ(checkpoint):
    before = checkpoint.read_bytes()
    report = repair_checkpoint(checkpoint)
    output = checkpoint.with_name("model.repaired.safetensors")
    old, new = spans(checkpoint), spans(output)
    assert list(old) == list(new)
    assert {name for name in old if old[name] != new[name]} == set(report.changed)
    assert set(report.changed) == {name for name in old if "proj" in name}
    assert checkpoint.read_bytes() == before
    assert output.stat().st_mode == checkpoint.stat().st_mode
    assert sorted(os.listdir(checkpoint.parent)) == [
        "model.repaired.safetensors", "model.repaired.safetensors.pss.json", "model.safetensors"
    ]  # fmt: skip


def test_the_strong_direction_comes_down_to_the_bulk_and_the_rest_stays(checkpoint):
    repair_checkpoint(checkpoint, options=RepairOptions(strength="gentle"))
    old, new = load_file(checkpoint), load_file(checkpoint.with_name("model.repaired.safetensors"))
    for name in [name for name in old if "proj" in name]:
        before, after = (torch.linalg.svdvals(w[name].double()) for w in (old, new))
        assert before[0] > 9
        assert after[0] < 1.2 * before[1]
        assert torch.allclose(after[1:], before[1:], rtol=2e-2)


def test_the_report_tells_what_the_oracle_measures(checkpoint):
    report = repair_checkpoint(checkpoint)
    output = checkpoint.with_name("model.repaired.safetensors")
    assert Report.from_json(report_path(output).read_text()) == report
    assert report.output == str(output)
    stored = load_file(checkpoint), load_file(output)
    for tensor in report.tensors:
        (matrix,) = tensor.matrices
        for values, rank, norm in zip(stored, matrix.stable_rank, matrix.spectral_norm, strict=True):
            s = torch.linalg.svdvals(values[tensor.name].double())
            assert norm == pytest.approx(float(s[0]), rel=2e-3)
            assert rank == pytest.approx(float((s / s[0]).square().sum()), rel=5e-3)
        moved = (stored[1][tensor.name] - stored[0][tensor.name]).norm() / stored[0][tensor.name].norm()
        assert tensor.relative_change == pytest.approx(float(moved), rel=1e-4)
    assert set(report.skipped) | {t.name for t in report.tensors} == set(stored[0])
    assert "position_ids" in report.skipped


def test_the_report_schema_is_frozen(checkpoint, tmp_path):
    save_file(tiny(), tmp_path / "good")
    options = RepairOptions(reference=tmp_path / "good")
    content = json.loads(repair_checkpoint(checkpoint, options=options, dry_run=True).to_json())
    assert list(content) == [
        "schema", "version", "source", "output", "format", "options", "tensors", "skipped", "seconds", "restored",
        "drift", "optimizer", "vectors", "reason", "notes",
    ]  # fmt: skip
    assert content["schema"] == "pss-param/repair-report/1"
    assert list(content["tensors"][0]) == [
        "name", "role", "block", "dtype", "shape", "changed", "relative_change", "matrices", "digest"
    ]  # fmt: skip
    assert list(content["tensors"][0]["matrices"][0]) == [
        "part", "shape", "stable_rank", "spectral_norm", "k", "edge", "residual", "converged", "note"
    ]  # fmt: skip
    assert list(content["drift"][0]) == ["name", "role", "block", "distance", "matrices"]
    assert list(content["drift"][0]["matrices"][0]) == ["part", "shape", "stable_rank", "spectral_norm"]
    assert list(content["optimizer"]) == ["mode", "states", "reset", "masters", "written", "order"]


def test_dry_run_computes_the_same_and_writes_nothing(checkpoint):
    dry = repair_checkpoint(checkpoint, dry_run=True)
    assert os.listdir(checkpoint.parent) == ["model.safetensors"]
    wet = repair_checkpoint(checkpoint)
    assert (dry.tensors, dry.skipped, dry.output) == (wet.tensors, wet.skipped, None)


def test_two_runs_give_the_same_bytes_whatever_else_is_chosen(checkpoint, tmp_path):
    repair_checkpoint(checkpoint, tmp_path / "a")
    repair_checkpoint(checkpoint, tmp_path / "b")
    torch.manual_seed(7)
    state = torch.get_rng_state()
    repair_checkpoint(checkpoint, tmp_path / "c", RepairOptions(exclude=("*down_proj*",)))
    assert torch.equal(torch.get_rng_state(), state)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert spans(tmp_path / "a")[SICK] == spans(tmp_path / "c")[SICK]


def test_a_second_repair_changes_next_to_nothing(checkpoint, tmp_path):
    repair_checkpoint(checkpoint, tmp_path / "once")
    again = repair_checkpoint(tmp_path / "once", tmp_path / "twice")
    assert all(tensor.relative_change < 1e-2 for tensor in again.tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_computed_wide_and_cast_once(tmp_path, dtype):
    path = tmp_path / "x.safetensors"
    save_file(tiny(dtype), path)
    report = repair_checkpoint(path)
    wide, _ = repair_state_dict({n: v.double() for n, v in load_file(path).items() if v.is_floating_point()})
    narrow = load_file(report.output)
    for name in report.changed:
        assert narrow[name].dtype == dtype
        error = (narrow[name].double() - wide[name]).norm() / wide[name].norm()
        assert error < {torch.float16: 2e-3, torch.bfloat16: 6e-3, torch.float64: 2e-3}[dtype]


def test_nan_and_infinity_are_refused_by_name_even_outside_the_targets(tmp_path):
    tensors = tiny()
    tensors["model.embed_tokens.weight"][3, 4:6] = float("nan")
    tensors[SICK][0, 0] = float("inf")
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    with pytest.raises(NonFiniteError) as caught:
        repair_checkpoint(path)
    assert f"{SICK} (1)" in str(caught.value)
    assert "model.embed_tokens.weight (2)" in str(caught.value)
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_an_overflow_of_the_cast_is_refused(tmp_path):
    # Raising one singular value makes entries that float16 cannot hold.
    weight = torch.full((48, 48), 60000.0, dtype=torch.float16)
    with pytest.raises(NonFiniteError, match="float16"):
        repair_state_dict({SICK: weight}, RepairOptions(smoothing=lambda S, edge: 2 * S, edge="init", init_std=50.0))


def test_never_the_input_under_any_name(checkpoint, tmp_path):
    (tmp_path / "link").symlink_to(checkpoint)
    os.link(checkpoint, tmp_path / "hard")
    for name in (checkpoint, tmp_path / "link", tmp_path / "hard"):
        with pytest.raises(CheckpointError, match="input itself"):
            repair_checkpoint(checkpoint, name, force=True)


def test_an_existing_output_needs_force(checkpoint):
    output = default_output(checkpoint)
    output.write_bytes(b"precious")
    with pytest.raises(CheckpointError, match="--force"):
        repair_checkpoint(checkpoint)
    assert output.read_bytes() == b"precious"
    repair_checkpoint(checkpoint, force=True)
    assert load_file(output).keys() == load_file(checkpoint).keys()


def test_a_symlinked_input_keeps_its_blob(checkpoint, tmp_path):
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(checkpoint)
    before = checkpoint.read_bytes()
    report = repair_checkpoint(folder / "model.safetensors")
    assert report.output == str(folder / "model.repaired.safetensors")
    assert checkpoint.read_bytes() == before


def test_a_source_that_changes_meanwhile_is_refused(checkpoint):
    def meddle(step):
        if step.stage == "repair":
            os.utime(checkpoint, ns=(1, 1))

    with pytest.raises(CheckpointError, match="changed while"):
        repair_checkpoint(checkpoint, progress=meddle)
    assert os.listdir(checkpoint.parent) == ["model.safetensors"]


def test_an_interrupt_leaves_nothing(checkpoint):
    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repair_checkpoint(checkpoint, progress=stop)
    assert os.listdir(checkpoint.parent) == ["model.safetensors"]


def test_progress_reaches_its_totals_in_order(checkpoint):
    steps = []
    repair_checkpoint(checkpoint, progress=steps.append)
    for stage in ("copy", "repair"):
        done = [step.done for step in steps if step.stage == stage]
        assert done == sorted(done)
        assert done[-1] == [step.total for step in steps if step.stage == stage][-1]


def test_init_edge_brings_values_to_the_norm_of_a_fresh_matrix():
    repaired, report = repair_state_dict({SICK: sick_matrix(64, 48)}, RepairOptions(edge="init", init_std=0.02))
    level = (64**0.5 + 48**0.5) * 0.02
    assert report.tensors[0].matrices[0].edge == pytest.approx(level)
    assert float(torch.linalg.matrix_norm(repaired[SICK], 2)) == pytest.approx(level, rel=1e-2)


def test_reference_edge_comes_from_the_same_tensor(checkpoint, tmp_path):
    healthy = {name: value / 2 if value.is_floating_point() else value for name, value in tiny().items()}
    save_file(healthy, tmp_path / "good.safetensors")
    options = RepairOptions(edge="reference", reference=tmp_path / "good.safetensors")
    report = repair_checkpoint(checkpoint, options=options)
    for tensor in report.tensors:
        expected = float(torch.linalg.matrix_norm(healthy[tensor.name].double(), 2))
        assert tensor.matrices[0].spectral_norm[1] == pytest.approx(expected, rel=1e-2)
    from_memory = RepairOptions(edge="reference", reference=healthy)
    assert repair_checkpoint(checkpoint, options=from_memory, dry_run=True).tensors == report.tensors


def test_reference_must_fit(checkpoint):
    for healthy in ({}, {name: value[:8] for name, value in tiny().items()}):
        with pytest.raises(ArgumentError, match="same model"):
            repair_checkpoint(checkpoint, options=RepairOptions(edge="reference", reference=healthy))
    for options in (
        {"edge": "reference"}, {"nonfinite": "reference"}, {"where": "drifted"}, {"device": "warp"},
        {"init_std": 0.1, "strength": "gentle"}, {"optimizer": "burn"}, {"drifted_below": 0.0}, {"optimizer": "reset"},
    ):  # fmt: skip
        with pytest.raises((ArgumentError, CheckpointError)):
            repair_checkpoint(checkpoint, options=RepairOptions(**options), dry_run=True)


def test_a_matrix_without_a_bulk_is_left_alone_with_a_reason():
    low = torch.outer(torch.randn(48), torch.randn(48))
    zero = torch.zeros(48, 48)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
    repaired, report = repair_state_dict(dict(zip(names, (low, zero), strict=True)), RepairOptions(strength="gentle"))
    assert report.changed == ()
    assert repaired[names[0]] is low
    assert "rank" in report.tensors[0].matrices[0].note
    assert "zero" in report.tensors[1].matrices[0].note


def test_no_target_is_an_error_that_names_the_way_out(tmp_path):
    save_file({"norm.weight": torch.ones(4)}, tmp_path / "x.safetensors")
    with pytest.raises(ArgumentError, match="include"):
        repair_checkpoint(tmp_path / "x.safetensors")


def test_state_dict_is_not_touched_and_ties_stay_ties():
    weight = sick_matrix(64, 48)
    other = "model.layers.1.mlp.up_proj.weight"
    given = {SICK: weight, other: weight, "norm.weight": torch.ones(4), "extra": {"step": 3}}
    copy = weight.clone()
    repaired, report = repair_state_dict(given)
    assert torch.equal(weight, copy)
    assert list(repaired) == list(given)
    assert repaired[SICK] is repaired[other]
    assert not torch.equal(repaired[SICK], weight)
    assert repaired["extra"] is given["extra"]
    assert repaired["norm.weight"] is given["norm.weight"]
    assert report.changed == (SICK,)
    assert SICK in report.skipped[other]


def test_the_editor_refuses_other_shapes_and_types(checkpoint, tmp_path):
    with (
        open_checkpoint(checkpoint) as layout,
        Editor(layout, tmp_path / "out") as editor,
        pytest.raises(CheckpointError, match="stored as"),
    ):
        editor.write(SICK, torch.zeros(2, 2))
    assert not (tmp_path / "out").exists()


def test_default_outputs(tmp_path):
    assert default_output("a/x.safetensors").name == "x.repaired.safetensors"
    assert default_output(tmp_path) == tmp_path.with_name(tmp_path.name + "-repaired")


def test_the_default_output_of_a_relative_folder_is_relative(tmp_path, monkeypatch):
    (tmp_path / "run" / "step").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert str(default_output("run/step/")) == "run/step-repaired"
    monkeypatch.chdir(tmp_path / "run")
    assert [str(default_output(name)) for name in (".", "step", "../run")] == [
        "../run-repaired", "step-repaired", "../run-repaired",
    ]  # fmt: skip


KILLER = """
import os, signal, sys
from pss_param.repair import repair_checkpoint

source, point = sys.argv[1], 0
while True:  # one child per point; the parent has done no tensor work when it forks
    child = os.fork()
    if child == 0:
        seen = 0

        def die(step):
            global seen
            seen += 1
            if seen > point:
                os.kill(os.getpid(), signal.SIGKILL)

        repair_checkpoint(source, progress=die)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    names = sorted(os.listdir(os.path.dirname(source)))
    print(point, os.waitstatus_to_exitcode(status), *names, flush=True)
    if os.waitstatus_to_exitcode(status) == 0:
        break
    point += 1
"""


def test_killed_at_every_step_the_destination_is_absent_and_the_next_run_cleans_up(checkpoint):
    before = checkpoint.read_bytes()
    command = [sys.executable, "-c", KILLER, str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    *killed, last = [line.split() for line in done.stdout.splitlines()]
    assert len(killed) > 10
    for line in killed:
        assert line[1] == "-9"
        assert "model.repaired.safetensors" not in line
        assert sum(".pss-tmp-" in name for name in line) <= 2  # this run's output and report, none of earlier runs
    assert last[1:] == ["0", *sorted(os.listdir(checkpoint.parent))]
    assert not any(".pss-tmp-" in name for name in last)
    assert checkpoint.read_bytes() == before
    assert load_file(default_output(checkpoint)).keys() == load_file(checkpoint).keys()


def test_an_edge_of_live_runs_is_refused_before_anything_is_written():
    with pytest.raises(
        ArgumentError, match="edge must be one of dominant, mild, bulk, init, reference, got 'baseline'"
    ):
        RepairOptions(edge="baseline")


def test_an_included_stack_of_matrices_is_repaired_as_one_that_is_named_experts():
    stack = torch.randn(3, 40, 32, generator=torch.Generator().manual_seed(0))
    stack[1] += 9 * torch.ones(40, 32)
    gentle = RepairOptions(strength="gentle", include=("*.w_in",))
    one, report = repair_state_dict({"blocks.0.moe.w_in": stack}, gentle)
    other, _ = repair_state_dict({"blocks.0.experts.up_proj": stack}, RepairOptions(strength="gentle"))
    assert [matrix.part for matrix in report.tensors[0].matrices] == ["[0]", "[1]", "[2]"]
    assert torch.equal(one["blocks.0.moe.w_in"], other["blocks.0.experts.up_proj"])
    assert not torch.equal(one["blocks.0.moe.w_in"][1], stack[1])
