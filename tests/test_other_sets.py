# SPDX-License-Identifier: Apache-2.0
"""A second set of weights in a checkpoint is named, and nothing else is taken for one."""

from functools import reduce
from operator import getitem

import pytest
import torch
from pss_param.cli.main import run

from pss_param.repair import repair_checkpoint, repair_state_dict


def network(prefix="", seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = {f"layers.{i}.mlp.up_proj.weight": torch.randn(64, 48, generator=generator) for i in range(3)}
    return {prefix + name: value for name, value in (weights | {"norm.weight": torch.ones(48)}).items()}


def notes(tmp_path, **others):
    torch.save({"model": network()} | others, tmp_path / "x.pt")
    return repair_checkpoint(tmp_path / "x.pt", force=True).notes


@pytest.mark.parametrize(
    ("others", "name", "path"),
    [
        ({"ema": network()}, "checkpoint['ema']", ["ema"]),
        ({"best": {"weights": network("module.")}}, "checkpoint['best']['weights']", ["best", "weights"]),
        ({"teacher": network("model.")}, "checkpoint['teacher']", ["teacher"]),
    ],
)
def test_it_is_named_and_the_way_out_works(tmp_path, capsys, others, name, path):
    (note,) = notes(tmp_path, **others)
    assert f"repair_state_dict({name})" in note
    assert run([str(tmp_path / "x.pt"), "--force"]) == 0
    assert note in capsys.readouterr().err
    old = torch.load(tmp_path / "x.pt", weights_only=True)
    new = torch.load(tmp_path / "x.repaired.pt", weights_only=True)
    assert not torch.equal(new["model"]["layers.0.mlp.up_proj.weight"], old["model"]["layers.0.mlp.up_proj.weight"])
    kept, was = (reduce(getitem, path, checkpoint) for checkpoint in (new, old))
    assert all(torch.equal(kept[key], was[key]) for key in was)
    assert len(repair_state_dict(kept)[1].changed) == 3


def test_all_are_in_one_sentence(tmp_path):
    (note,) = notes(tmp_path, ema=network(), best=network())
    assert "checkpoint['ema'], checkpoint['best']" in note


def test_a_key_of_any_length_is_shown_in_part(tmp_path):
    (note,) = notes(tmp_path, **{"e" * 5000: network()})
    assert len(note) < 500


def test_what_is_none(tmp_path):
    weights = network()
    moments = {name: {"exp_avg": value.clone()} for name, value in weights.items()}
    groups = [{"params": list(weights)}]
    assert notes(tmp_path) == ()
    assert notes(tmp_path, optimizer={"state": moments, "param_groups": groups}) == ()
    assert notes(tmp_path, optimizer={"exp_avg": network()}) == ()
    assert notes(tmp_path, opt={"state": moments, "exp_avg": network(), "param_groups": groups}) == ()
    assert notes(tmp_path, other={name: value[:4].clone() for name, value in weights.items()}) == ()
    assert notes(tmp_path, discriminator={f"net.{name}": value.clone() for name, value in weights.items()}) == ()


def test_what_shares_the_bytes_is_repaired_with_the_model(tmp_path):
    weights = network()
    assert notes(tmp_path, model=weights, copy={name: value.detach() for name, value in weights.items()}) == ()
    new = torch.load(tmp_path / "x.repaired.pt", weights_only=True)
    assert all(torch.equal(new["copy"][name], value) for name, value in new["model"].items())
