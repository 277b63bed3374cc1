# SPDX-License-Identifier: Apache-2.0
"""The command line: exit codes, streams, options, and errors of one line."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from click.testing import CliRunner
from pss_param.cli.main import run
from safetensors.torch import load_file, save_file

from pss_param.checkpoint import open_checkpoint
from pss_param.repair import repair_checkpoint

SICK = "model.layers.{}.mlp.up_proj.weight"


def matrix(seed, strength=0.0):
    source = torch.Generator().manual_seed(seed)
    u, v = torch.randn(96, 1, generator=source), torch.randn(1, 48, generator=source)
    return torch.randn(96, 48, generator=source) / 48**0.5 + strength * u @ v / (u.norm() * v.norm())


@pytest.fixture
def checkpoint(tmp_path):
    """Six layers, of which the third is sick."""
    path = tmp_path / "model.safetensors"
    save_file(
        {SICK.format(i): matrix(i, 30.0 if i == 2 else 0.0) for i in range(6)} | {"n.weight": torch.ones(4)},
        path,
    )
    return path


@pytest.fixture
def call(capsys):
    """Run the command in this process; returns exit code, stdout, stderr."""

    def call(*args):
        code = run([str(arg) for arg in args])
        return code, *capsys.readouterr()

    return call


def test_the_command_is_the_repair_and_has_the_bytes_of_its_library_twin(checkpoint, call, tmp_path):
    code, out, err = call(checkpoint)
    assert code == 0
    assert SICK.format(2) in out
    assert "wrote" in err
    repair_checkpoint(checkpoint, tmp_path / "twin")
    assert (tmp_path / "model.repaired.safetensors").read_bytes() == (tmp_path / "twin").read_bytes()


def test_json_is_all_of_stdout_and_equals_the_file(checkpoint, call, tmp_path):
    code, out, _ = call("--json", checkpoint, "-o", tmp_path / "out")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "out.pss.json").read_text())


def test_dry_run_with_options_before_the_checkpoint(checkpoint, call):
    code, out, err = call("--dry-run", "--exclude", "*layers.2*", checkpoint)
    assert code == 0
    assert SICK.format(2) not in out
    assert "nothing was written" in err
    assert os.listdir(checkpoint.parent) == ["model.safetensors"]


def test_threads_are_the_callers_again_at_the_end(checkpoint, call):
    before = torch.get_num_threads()
    assert call(checkpoint, "--dry-run", "--threads", str(before + 1))[0] == 0
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "options",
    [
        ["--smoothing", "log"],
        ["--edge", "dominant", "--rank", "2"],
        ["--edge", "init", "--init-std", "0.1"],
        ["--targets", "mlp", "--include", "*up_proj*"],
        ["--device", "cpu", "--seed", "3", "--threads", "1"],
    ],
)
def test_options_reach_the_report(checkpoint, call, options):
    code, out, _ = call(checkpoint, "--dry-run", "--json", *options)
    assert code == 0
    given = dict(zip(options[::2], options[1::2], strict=True))
    given.pop("--threads", None)
    recorded = json.loads(out)["options"]
    for option, value in given.items():
        found = recorded[option[2:].replace("-", "_")]
        assert str(found[0] if isinstance(found, list) else found) == value


def test_scan_exits_with_3_on_damage_and_0_without(checkpoint, call):
    code, out, err = call("scan", checkpoint)
    assert code == 3
    (line,) = [line for line in out.splitlines() if SICK.format(2) in line]
    assert "peers" in line
    assert "damage" in err
    call(checkpoint)
    code, out, err = call("scan", checkpoint.with_name("model.repaired.safetensors"))
    assert (code, "damage: " in err) == (0, False)


def test_scan_in_json(checkpoint, call):
    code, out, _ = call("scan", "--json", checkpoint)
    content = json.loads(out)
    assert code == 3
    assert [row["name"] for row in content["rows"] if row["damaged"]] == [SICK.format(2)]
    assert content["skipped"].keys() == {"n.weight"}


def test_scan_and_repair_agree_on_how_far_all_has_grown(call, tmp_path):
    grown = tmp_path / "grown.safetensors"
    save_file({SICK.format(i): 4 * matrix(i) for i in range(6)}, grown)
    code, _, err = call("scan", grown)
    assert (code, "damage: " in err) == (0, False)
    (told,) = re.findall(r"would be (deep: .* x the spectral norm of fresh ones \(median of 6\);.*)", err)
    assert told in call(grown, "--dry-run")[2]
    content = json.loads(call("scan", "--json", grown)[1])
    assert content["reason"] == told
    assert f"{content['growth']:.1f} x" in told


def test_scan_lists_the_skipped_with_reasons(checkpoint, call):
    assert "n.weight" not in call("scan", checkpoint)[1]
    assert re.search(r"n\.weight +\S", call("scan", "--skipped", checkpoint)[1])


def one_line(err):
    return err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err


def test_errors_are_one_line_and_1(checkpoint, call, tmp_path):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"junk")
    nan = tmp_path / "nan.safetensors"
    save_file({SICK.format(0): torch.full((9, 9), float("nan"))}, nan)
    (tmp_path / "empty").mkdir()
    for args in (
        ["none.safetensors"], [bad], ["scan", bad], ["export", bad], [nan], [tmp_path / "empty"],
            ["verify", checkpoint],
            ["compare", checkpoint, bad], [checkpoint, "--optimizer", "reset"], [checkpoint, "--where", "drifted"],
        [checkpoint, "-o", checkpoint], [checkpoint, "-o", checkpoint, "--force"],
        [checkpoint, "-o", tmp_path / "no" / "folder"], [checkpoint, "--device", "warp"],
        [checkpoint, "--edge", "reference"], [checkpoint, "--rank", "2"], ["demo.safetensors\nx"],
    ):  # fmt: skip
        code, out, err = call(*args)
        assert (code, out) == (1, ""), args
        assert one_line(err), err


def test_two_models_without_a_common_tensor_are_an_error(checkpoint, call, tmp_path):
    save_file({"fc.weight": torch.eye(8)}, tmp_path / "other")
    for args in (["compare", tmp_path / "other", checkpoint], [checkpoint, "--reference", tmp_path / "other"]):
        code, out, err = call(*args)
        assert (code, out) == (1, "")
        assert one_line(err)
        assert "same model" in err


def test_nan_is_damage_to_a_scan(call, tmp_path):
    nan = tmp_path / "nan.safetensors"
    save_file({SICK.format(0): torch.full((9, 9), float("nan")), SICK.format(1): torch.randn(9, 9)}, nan)
    code, out, _ = call("scan", nan)
    assert code == 3
    assert "81 values" in out


def test_wrong_usage_is_2(checkpoint, call):
    for args in (
        [checkpoint, "--edge", "sharp"],
        [checkpoint, "--nope"],
        ["scan"],
        [checkpoint, "--threads", "0"],
    ):
        code, _, err = call(*args)
        assert code == 2, args
        assert "Usage" in err


def test_the_word_help_points_to_the_option_unless_it_is_a_checkpoint(checkpoint, call, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    for args in (["help"], ["help", "scan"]):
        code, _, err = call(*args)
        assert code == 2
        assert "COMMAND --help" in err
    checkpoint.rename("help")
    assert call("help", "--dry-run")[0] == 0


def test_one_of_a_thing_is_called_one(call, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(
        {
            SICK.format(0): 9 * matrix(0),
            "model.layers.0.norm.weight": torch.full((4,), 3.0),
            "ids": torch.ones(1, dtype=torch.int64),
        },
        path,
    )
    assert "1 matrix, median stable rank" in call("scan", path)[2]
    assert "2 other tensors not scanned" in call("scan", path)[2]
    err = call(path)[2]
    assert "1 norm or bias is back at its initial value" in err
    assert "1 of 1 target changed, 1 other tensor untouched" in err
    assert "2 changed tensors are as" in call("verify", tmp_path / "x.repaired.safetensors")[2]
    assert "1 target, 0 other tensors differ, 2 are equal" in call("compare", path, path)[2]


def test_help_teaches_and_version_is_the_librarys(call):
    from pss_param import __version__

    code, out, _ = call("--help")
    assert code == 0
    for word in ("CKPT", "scan", "export", "demo", "--edge", "--dry-run", "Exit codes"):
        assert word in out
    assert __version__ in call("--version")[1]
    assert call("scan", "--help")[0] == 0


def test_control_c_is_one_line_and_1(checkpoint, call, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("pss_param.cli.repair.repair_checkpoint", interrupt)
    code, _, err = call(checkpoint)
    assert code == 1
    assert one_line(err)


def test_an_error_of_the_system_is_one_line_and_1(checkpoint, call, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = call(checkpoint)
    assert code == 1
    assert one_line(err)
    assert "No space left" in err
    assert os.listdir(checkpoint.parent) == ["model.safetensors"]


def test_export_gives_plain_names_and_the_same_bytes(call, tmp_path):
    path = tmp_path / "x.safetensors"
    weight, bias = torch.randn(4, 3), torch.randn(4)
    save_file({"fc.parametrizations.weight.original": weight, "fc.bias": bias}, path, metadata={"format": "pt"})
    code, out, _ = call("export", path)
    assert (code, out.strip()) == (0, str(tmp_path / "x.plain.safetensors"))
    plain = load_file(tmp_path / "x.plain.safetensors")
    assert plain.keys() == {"fc.weight", "fc.bias"}
    assert torch.equal(plain["fc.weight"], weight)
    assert torch.equal(plain["fc.bias"], bias)


def test_export_writes_nothing_where_all_names_are_plain(checkpoint, call):
    code, out, err = call("export", checkpoint)
    assert (code, out.strip()) == (0, str(checkpoint))
    assert "nothing was written" in err
    assert os.listdir(checkpoint.parent) == [checkpoint.name]


def test_export_keeps_types_metadata_order_and_refuses_what_must_be_computed(call, tmp_path):
    path, out = tmp_path / "x.safetensors", tmp_path / "out"
    given = {
        "a.parametrizations.weight.original": torch.randn(3, 3).bfloat16(),
        "b.weight": torch.arange(4),
        "c": torch.tensor(True),
    }
    save_file(given, path, metadata={"note": "ü"})
    path.chmod(0o600)
    assert call("export", path, "-o", out)[0] == 0
    with open_checkpoint(path) as old, open_checkpoint(out) as new:
        assert new.header.metadata == {"note": "ü"}
        names = [name.replace("parametrizations.", "").replace(".original", "") for name in old.tensors]
        assert list(new.tensors) == names
        for before, after in zip(old.tensors, new.tensors, strict=True):
            assert torch.equal(old.read(before), new.read(after))
    assert out.stat().st_mode & 0o777 == 0o600
    assert call("export", path, "-o", out)[0] == 1
    assert call("export", path, "-o", out, "--force")[0] == 0
    assert call("export", path, "-o", path, "--force")[0] == 1
    save_file({"w.parametrizations.weight.original0": torch.ones(2)}, path)
    code, _, err = call("export", path, "-o", tmp_path / "never")
    assert code == 1
    assert one_line(err)
    assert not (tmp_path / "never").exists()


def program(*args, **env):
    command = [sys.executable, "-m", "pss_param", *map(str, args)]
    clean = {k: v for k, v in os.environ.items() if k not in {"NO_COLOR", "FORCE_COLOR", "COLUMNS"}}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**clean, **env})


def test_as_a_program_colour_can_be_switched_off_and_pipes_lose_nothing(checkpoint):
    coloured = program("scan", checkpoint, FORCE_COLOR="1")
    plain = program("scan", checkpoint, NO_COLOR="1")
    assert (coloured.returncode, plain.returncode) == (3, 3)
    assert "\x1b" not in plain.stdout + plain.stderr
    assert SICK.format(2) in plain.stdout
    assert "Traceback" not in coloured.stderr + plain.stderr


def test_names_that_look_like_markup_are_shown_as_they_are(call, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"layers.0.mlp.up_proj.weight": matrix(0), "[red]n[/blue]": torch.ones(3)}, path)
    code, out, _ = call("scan", "--skipped", path)
    assert code == 0
    assert "[red]n[/blue]" in out


def test_a_narrow_terminal_folds_instead_of_cutting(checkpoint, call, monkeypatch):
    monkeypatch.setattr("pss_param.cli.console.PIPE_WIDTH", 50)
    _, out, _ = call("scan", checkpoint)
    assert max(map(len, out.splitlines())) <= 50
    assert "…" not in out


def test_click_runner_reaches_the_group():
    from pss_param.cli.main import cli

    assert CliRunner().invoke(cli, ["--version"]).exit_code == 0


def test_a_real_interrupt_leaves_nothing_and_prints_one_line(tmp_path):
    path = tmp_path / "big.safetensors"
    save_file({SICK.format(i): matrix(i, 5.0).repeat(8, 16) for i in range(60)}, path)
    process = subprocess.Popen(
        [sys.executable, "-m", "pss_param", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not any(".pss-tmp-" in name for name in os.listdir(tmp_path)):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert one_line(err), err
    assert os.listdir(tmp_path) == ["big.safetensors"]


def test_compare_verify_and_drift(checkpoint, call, tmp_path):
    good = tmp_path / "good.safetensors"
    save_file({SICK.format(i): matrix(i) for i in range(6)} | {"n.weight": torch.ones(4)}, good)
    code, out, err = call("compare", good, checkpoint)
    assert code == 0
    assert SICK.format(2) in out
    assert "6 targets" in err
    content = json.loads(call("compare", "--json", good, checkpoint)[1])
    moved = {row["name"] for row in content["rows"] if row["distance"] > 0}
    assert (content["schema"], moved) == ("pss-param/compare-report/1", {SICK.format(2)})
    assert content["identical"] == 6
    assert "distance" in call("scan", checkpoint, "--reference", good)[1]
    code, out, _ = call(checkpoint, "--reference", good, "--where", "drifted", "--json")
    report = json.loads(out)
    assert code == 0
    assert [tensor["name"] for tensor in report["tensors"]] == [SICK.format(2)]
    assert "not below 0.5" in report["skipped"][SICK.format(1)]
    output = tmp_path / "model.repaired.safetensors"
    assert call("verify", output, "--source", checkpoint)[0] == 0
    assert json.loads(call("verify", output, "--json")[1])["problems"] == []
    save_file(load_file(good) | {"n.weight": torch.zeros(4)}, good)
    code, _, err = call("verify", output, "--source", good)
    assert code == 1
    assert one_line(err)
