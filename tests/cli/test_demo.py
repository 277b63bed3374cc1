# SPDX-License-Identifier: Apache-2.0
"""``pss-repair demo`` as a newcomer calls it; the slow tests are the promise itself."""

import csv
import re
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from pss_param.cli.demo_run import Recipe, play
from pss_param.cli.demo_text import load_text
from pss_param.cli.demo_verdict import failures
from pss_param.cli.main import cli
from safetensors.torch import load_file

from pss_param.report import Report, report_path

TINY = Recipe(seed=3, steps=4, kill_steps=2, batch=2, context=8, width=16, layers=2, heads=2)
RUNS = ("healthy", "dead", "dead.repaired", "control", "restart", "rescued")


def silent(act, step, loss):
    """Take no notice of progress."""


@pytest.fixture(scope="module")
def text():
    return load_text()


def test_a_demo_too_short_to_learn_says_so_and_exits_with_1(tmp_path):
    threads = torch.get_num_threads()
    result = CliRunner().invoke(cli, ["demo", "--steps", "3", "--keep", str(tmp_path / "kept")])
    assert result.exit_code == 1
    assert "no rescue with seed 0: the healthy run learned too little" in result.stderr
    assert re.search(r"^rescued: resumed repaired( +\d+\.\d+){3}$", result.stdout, re.MULTILINE)
    assert "Rescued:" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) < 80
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {
        *(f"{run}.safetensors" for run in RUNS),
        "dead.repaired.safetensors.pss.json",
        "loss.csv",
    }
    rows = list(csv.DictReader((tmp_path / "kept" / "loss.csv").open(newline="")))
    assert [row["step"] for row in rows if row["run"] == "healthy"] == ["1", "2", "3"]
    assert {row["run"] for row in rows} == {*RUNS} - {"dead.repaired"}
    assert torch.get_num_threads() == threads


def test_keep_never_mixes_with_what_is_there(tmp_path):
    (tmp_path / "mine").write_text("precious")
    result = CliRunner().invoke(cli, ["demo", "--keep", str(tmp_path)])
    assert result.exit_code == 1
    assert "new or empty folder" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.usefixtures("global_random_state_untouched")
def test_a_seed_decides_every_step(text, tmp_path):
    curves = []
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        curves.append({name: act.curve for name, act in play(TINY, text, tmp_path / run, silent).items()})
    assert curves[0] == curves[1]
    assert (tmp_path / "a/rescued.safetensors").read_bytes() == (tmp_path / "b/rescued.safetensors").read_bytes()


def test_the_repair_is_that_of_the_command_and_touches_only_block_matrices(text, tmp_path):
    play(TINY, text, tmp_path, silent)
    command = ["-o", str(tmp_path / "twin.safetensors"), str(tmp_path / "dead.safetensors")]
    assert CliRunner().invoke(cli, command).exit_code == 0
    repaired = tmp_path / "dead.repaired.safetensors"
    assert repaired.read_bytes() == (tmp_path / "twin.safetensors").read_bytes()
    report = Report.from_json(report_path(repaired).read_text())
    assert len(report.tensors) == 12
    dead, fixed = load_file(tmp_path / "dead.safetensors"), load_file(repaired)
    assert {name for name in dead if not torch.equal(dead[name], fixed[name])} == set(report.changed)


def test_the_three_runs_after_the_death_are_the_same_but_for_where_they_begin(text, tmp_path):
    drawn = {}
    batch = type(text).batch

    class Spy(type(text)):
        def batch(self, size, context, generator):
            drawn.setdefault(act[0], []).append(found := batch(self, size, context, generator))
            return found

    act = ["healthy"]
    order = [name for name in RUNS if name != "dead.repaired"]
    lengths = {"healthy": TINY.steps, "dead": TINY.kill_steps}

    def follow(name, step, loss):
        if step == lengths.get(name, TINY.resume_steps):
            act[0] = [*order, "end"][order.index(name) + 1]

    play(TINY, Spy(text.train, text.held_out), tmp_path, follow)
    for other in ("restart", "rescued"):
        for (x, y), (a, b) in zip(drawn["control"], drawn[other], strict=True):
            assert torch.equal(x, a)
            assert torch.equal(y, b)


def test_help_says_what_happens():
    shown = CliRunner().invoke(cli, ["demo", "--help"]).stdout
    assert "--keep DIR" in shown
    assert "Exits with 1" in shown


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_default_demo_rescues(seed, text, tmp_path):
    acts = play(Recipe(seed=seed), text, tmp_path, silent)
    losses = {name: act.loss for name, act in acts.items()}
    assert failures(losses, text.unigram_loss(Recipe.context)) == []
    assert acts["dead"].stable_rank < acts["healthy"].stable_rank / 2 < acts["dead.repaired"].stable_rank


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_rescues_and_exits_with_0_in_plain_text():
    program = "import sys; from pss_param.cli.main import main; main(['demo', '--seed', '2'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Rescued:" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
