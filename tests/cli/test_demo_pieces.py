# SPDX-License-Identifier: Apache-2.0
"""The demo's pieces: its text, its network, its rules, its plot."""

import math

import pytest
import torch
from pss_param.cli.demo_model import CharacterTransformer
from pss_param.cli.demo_plot import Curve, draw
from pss_param.cli.demo_text import ALPHABET, load_text, split
from pss_param.cli.demo_verdict import failures

from pss_param.targets import TargetRules, select_parameters

GOOD = {"healthy": 1.7, "control": 3.25, "restart": 2.2, "rescued": 2.0}


@pytest.fixture(scope="module")
def text():
    return load_text()


def network():
    return CharacterTransformer(len(ALPHABET), width=16, layers=2, heads=2, context=8)


def test_every_page_is_in_one_part_and_one_in_twenty_is_held_out():
    pages = torch.arange(40).repeat_interleave(1024)
    text = split(torch.cat([pages, torch.tensor([99])]))
    assert text.held_out.unique().tolist() == [19, 39]
    assert sorted({*text.train.tolist(), *text.held_out.tolist()}) == list(range(40))


def test_the_text_is_english(text):
    written = "".join(ALPHABET[i] for i in text.train[:200_000])
    assert " statement" in written
    assert len(text.train) > 15 * len(text.held_out) > 100_000


def test_a_batch_pairs_each_character_with_the_next(text):
    x, y = text.batch(5, 32, torch.Generator().manual_seed(3))
    assert x.shape == y.shape == (5, 32)
    assert torch.equal(x[:, 1:], y[:, :-1])
    again, _ = text.batch(5, 32, torch.Generator().manual_seed(3))
    assert torch.equal(x, again)


def test_unigram_loss_is_what_a_network_of_frequencies_alone_reaches(text):
    _, y = text.exam(64)
    own = torch.bincount(y.flatten(), minlength=len(ALPHABET)).double() / y.numel()
    entropy = -float((own * own.clamp_min(1e-300).log()).sum())
    assert entropy <= text.unigram_loss(64) < entropy + 0.05
    assert text.unigram_loss(64) < math.log(len(ALPHABET)) - 1


def test_the_default_repair_takes_the_six_matrices_of_every_block_and_nothing_else():
    names = {target.name for target in select_parameters(network(), TargetRules()).targets}
    roles = ("q", "k", "v", "o", "up", "down")
    assert names == {f"layers.{i}.{role}_proj.weight" for i in range(2) for role in roles}


def test_the_network_does_not_see_the_future():
    model, x = network(), torch.arange(8)[None]
    changed = x.clone()
    changed[0, 5] = 90
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_stable_rank_of_the_network_is_the_median_of_its_block_matrices():
    model = network()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.copy_(3 * torch.eye(*parameter.shape))
    assert model.stable_rank() == pytest.approx(16, rel=1e-3)


def test_a_rescue_breaks_no_rule():
    assert failures(GOOD, 3.25) == []
    assert failures({**GOOD, "control": math.nan}, 3.25) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"healthy": 3.0}, "learned too little"),
        ({"control": 3.1, "rescued": 2.0}, "came back by itself"),
        ({"rescued": 3.1, "restart": 3.2}, "did not learn again"),
        ({"rescued": 2.25}, "no better than a restart"),
        ({"healthy": math.nan}, "learned too little"),
    ],
)
def test_each_rule_is_reported_alone(change, words):
    (sentence,) = failures({**GOOD, **change}, 3.25)
    assert words in sentence


def test_a_rescue_to_nan_is_none():
    assert len(failures({**GOOD, "rescued": math.nan}, 3.25)) == 2


def test_a_curve_is_averaged_over_the_columns_of_its_share():
    assert Curve([1.0, 3.0, 5.0, 7.0], "*", "", 0.5, 1.0).columns(4) == {2: 2.0, 3: 6.0}
    assert Curve([1.0, 2.0], "*", "").columns(4) == {0: 1.0, 1: 1.0, 2: 2.0, 3: 2.0}


def test_the_plot_puts_high_values_on_top_and_clamps_what_lies_outside():
    curves = [Curve([9.0, math.nan, 1.0, -5.0], "*", "red"), Curve([2.0], "o", "", 0.0, 0.25)]
    drawn = draw(curves, (1.0, 3.0), (10, 3), 2.0).plain.splitlines()
    assert drawn == [" 3.0 |**  ", " 2.0 |o...", " 1.0 |  **"]
