# SPDX-License-Identifier: Apache-2.0
"""Several repairs, judged by short runs."""

import math
import os
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pss_param as pss

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
UP = "layers.0.mlp.up_proj.weight"


def sick():
    chance = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 48, generator=chance) / 7
    weight += 9 * torch.outer(torch.randn(64, generator=chance), torch.randn(48, generator=chance)) / 55
    return {UP: weight, "norm.weight": torch.full((48,), 2.0)}


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the examples are in the repository only")
def test_a_short_run_tells_which_repair_revives_a_dead_network(tmp_path, capsys):
    runpy.run_path(str(EXAMPLES / "probe_repairs.py"))["main"](tmp_path, steps=60)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    losses = {row[0]: float(row[-4]) for row in rows[2:5]}
    assert next(iter(losses)) == "deep"
    assert losses["deep"] < losses["as"] - 0.2
    assert rows[5] == ["wrote", "dead.repaired.safetensors"]
    assert sorted(os.listdir(tmp_path)) == [
        "dead.repaired.safetensors", "dead.repaired.safetensors.pss.json", "dead.safetensors"
    ]  # fmt: skip


def test_the_judge_sees_one_whole_copy_at_a_time(tmp_path):
    source, seen = tmp_path / "sick.safetensors", []
    save_file(sick(), source)

    def judge(path):
        seen.append((path, load_file(path)[UP]))
        copies = [folder for folder in tmp_path.iterdir() if folder.is_dir()]
        assert len(copies) == (path != source)
        assert path.name == source.name
        return -len(seen)

    trials = pss.probe_repairs(source, judge)
    assert [trial.loss for trial in trials] == [-3, -2, -1]
    assert [trial.options and trial.options.strength for trial in trials] == ["deep", "gentle", None]
    assert trials[-1].report is None
    assert seen[0][0] == source
    assert not any(path.exists() for path, _ in seen[1:])
    assert os.listdir(tmp_path) == ["sick.safetensors"]
    for trial, (_, values) in zip(trials, reversed(seen), strict=True):
        if trial.options is not None:
            assert torch.equal(values, pss.repair_state_dict(sick(), trial.options)[0][UP])
            assert trial.report.changed


def test_folders_and_text_as_paths(tmp_path):
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    save_file(sick(), folder / "model.safetensors")
    kinds = set()

    def judge(path):
        kinds.add(type(path))
        return float(load_file(Path(path, "model.safetensors"))[UP].norm())

    losses = [trial.loss for trial in pss.probe_repairs(str(folder), judge)]
    assert losses == sorted(losses)
    assert kinds == {str}


def test_what_is_not_finite_comes_last_and_ties_go_to_the_least_change():
    answers = iter([math.nan, 2.0, -math.inf, 2.0])
    candidates = (None, pss.RepairOptions(strength="deep"), pss.RepairOptions(edge="init"), pss.RepairOptions())
    trials = pss.probe_repairs(sick(), lambda _: next(answers), candidates)
    assert [candidates.index(trial.options) for trial in trials] == [1, 3, 0, 2]


def test_the_source_stays_as_it_was_and_an_error_of_the_judge_leaves_nothing(tmp_path):
    state, before = sick(), sick()
    pss.probe_repairs(state, lambda repaired: float(repaired[UP].norm()))
    assert all(torch.equal(state[name], before[name]) for name in before)
    save_file(state, tmp_path / "x.safetensors")

    def broken(path):
        raise KeyError(path)

    with pytest.raises(KeyError):
        pss.probe_repairs(tmp_path / "x.safetensors", broken, pss.probe.CANDIDATES[1:])
    assert os.listdir(tmp_path) == ["x.safetensors"]
