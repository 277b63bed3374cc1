# SPDX-License-Identifier: Apache-2.0
"""The examples of plain loops run, and the training ones die without the guard and live with it."""

import pytest
import torch
from loops import one_thread
from scripted import UNIGRAM, example


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("guard_training", {}),
        pytest.param("guard_training", {"compiled": True}, marks=pytest.mark.slow),
        pytest.param("amp_and_accumulation", {}, marks=pytest.mark.slow),
    ],
)
def test_it_dies_without_the_guard_and_lives_with_it(name, options):
    torch._dynamo.reset()
    with one_thread():
        assert example(name)(guarded=False) > UNIGRAM - 0.1
        assert example(name)(guarded=True, **options) < UNIGRAM - 0.3
    torch._dynamo.reset()


def test_amp_and_accumulation_begins_to_learn(capsys):
    with one_thread():
        assert example("amp_and_accumulation")(steps=3) < 6
    assert "3 steps" in capsys.readouterr().out


def test_register_one_view(capsys):
    assert example("register_one_view")() >= 1
    assert "0.weight" in capsys.readouterr().out


def test_export_weights():
    assert example("export_weights")()
