# SPDX-License-Identifier: Apache-2.0
"""The learning rate that a checkpoint goes on with is the last line of its repair."""

from collections import OrderedDict

import pytest
import torch
from pss_param.cli.main import run
from safetensors.torch import save_file

from pss_param.repair import repair_checkpoint

WEIGHTS = {f"layers.{i}.mlp.up_proj.weight": torch.randn(64, 48) for i in range(3)}


def optimizer(*rates, **more):
    return {"state": {}, "param_groups": [{"lr": rate, "params": []} | more for rate in rates]}


def rate_note(tmp_path, **others):
    torch.save({"model": WEIGHTS} | others, tmp_path / "x.pt")
    return [note for note in repair_checkpoint(tmp_path / "x.pt", force=True).notes if "learning rate" in note]


def test_it_is_the_last_line(tmp_path, capsys):
    weights = {name: torch.nn.Parameter(value) for name, value in WEIGHTS.items()}
    adam = torch.optim.AdamW(weights.values(), lr=0.1)
    sum(value.square().sum() for value in weights.values()).backward()
    adam.step()
    mask = {"layers.0.mask": torch.triu(torch.full((4, 4), float("-inf")), 1)}
    torch.save({"model": WEIGHTS | mask, "optimizer": adam.state_dict()}, tmp_path / "x.pt")
    assert run([str(tmp_path / "x.pt")]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == (
        "the checkpoint's optimizer resumes at a learning rate of 0.1: the rate that killed the run kills it again, "
        "set a lower one"
    )


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"optimizer": optimizer(0.1)}, "of 0.1:"),
        ({"opt": OrderedDict(optimizer(0.01, 0.1, 0.01))}, "of 0.01 to 0.1:"),
        ({"optimizers": [optimizer(1e-4), optimizer(3)]}, "of 0.0001 to 3:"),
        ({"optimizer": optimizer(0.05, initial_lr=0.2)}, "of 0.05 (initial_lr 0.2):"),
        ({"optimizer": optimizer(0.05, initial_lr=0.05)}, "of 0.05:"),
    ],
)
def test_where_it_stands(tmp_path, others, words):
    (note,) = rate_note(tmp_path, **others)
    assert words in note


def test_lightning_and_folders(tmp_path):
    content = {"pytorch-lightning_version": "2.6", "state_dict": WEIGHTS, "optimizer_states": [optimizer(0.3)]}
    torch.save(content, tmp_path / "x.ckpt")
    assert "of 0.3:" in repair_checkpoint(tmp_path / "x.ckpt").notes[-1]
    (tmp_path / "checkpoint-9").mkdir()
    save_file(WEIGHTS, tmp_path / "checkpoint-9" / "model.safetensors")
    torch.save(optimizer(0.7), tmp_path / "checkpoint-9" / "optimizer.pt")
    assert "of 0.7:" in repair_checkpoint(tmp_path / "checkpoint-9").notes[-1]


@pytest.mark.parametrize("rate", [None, "0.1", torch.tensor(0.1), float("nan"), float("inf"), 0, True, 10**400])
def test_nothing_is_said_where_no_rate_is_known(tmp_path, rate):
    assert rate_note(tmp_path, optimizer=optimizer(rate)) == []
    assert rate_note(tmp_path, optimizer=optimizer(rate) | {"param_groups": 3}) == []
    assert rate_note(tmp_path, lr=0.1) == []
