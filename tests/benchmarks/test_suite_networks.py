# SPDX-License-Identifier: Apache-2.0
"""The suite's networks, data and optimizers: each against a second way to compute the same thing."""

from __future__ import annotations

import copy
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the examples are in the repository only", allow_module_level=True)
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))

from suite.attention import SelfAttention  # noqa: E402
from suite.data import IGNORED, MASK, MaskedCharacter, NextCharacter, digits, text  # noqa: E402
from suite.muon import StackedMuon  # noqa: E402
from suite.networks import Recurrent, Shape, TextTransformer, waves  # noqa: E402
from suite.optimizers import make_optimizer  # noqa: E402
from suite.task import evaluate, tasks  # noqa: E402

NAMES = [
    "gpt-postln-adamw",
    "gpt-preln-adamw",
    "gpt-preln-muon",
    "bert-adamw",
    "gpt-deep-adamw",
    "vit-adamw",
    "cnn-sgd",
    "mlp-adamw",
    "mlp-sgd",
    "lstm-adamw",
]
MULTIPLES = (1, 2, 4, 8, 16, 32, 64)


def train(task, model, optimizer, steps):
    losses = []
    for batch in itertools.islice(task.batches(0), steps):
        loss = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_the_tasks_are_these():
    assert list(tasks()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_rates_are_in_order(name):
    task = tasks()[name]
    assert task.lr < task.early_lr
    assert any(math.isclose(task.early_lr, task.lr * multiple) for multiple in MULTIPLES)
    assert task.lr < task.kill_lr
    assert 20 <= task.kill_steps <= 60


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_depends_on_its_seed_alone(name, global_random_state_untouched):
    task = tasks()[name]
    first, again, other = (list(itertools.islice(task.batches(seed), 2)) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for pair in zip(first, again, strict=True) for a, b in zip(*pair, strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    assert not torch.equal(first[0][0], first[1][0])


@pytest.mark.parametrize("name", NAMES)
def test_a_network_follows_the_seed_and_learns(name):
    task, models = tasks()[name], []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(task.build())
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))
    before = evaluate(models[0], task)
    train(task, models[0], make_optimizer(task.optimizer, models[0], task.lr), 8)
    assert evaluate(models[0], task) < before


def test_evaluation_is_in_evaluation_mode_and_puts_the_mode_back():
    task = tasks()["cnn-sgd"]
    model = task.build()
    running = model.layers[0].norm1.running_mean.clone()
    assert evaluate(model, task) == evaluate(model, task)
    assert torch.equal(model.layers[0].norm1.running_mean, running)
    assert model.training


def test_the_trivial_loss_is_that_of_the_best_constant_prediction():
    source = NextCharacter(4, 32)
    frequencies = torch.bincount(text().train, minlength=96).double() / len(text().train)
    entropy = float(torch.special.entr(frequencies).sum())
    assert source.trivial == pytest.approx(entropy, abs=0.05)
    assert MaskedCharacter(4, 32, 0.25).trivial == pytest.approx(entropy, abs=0.1)
    labels = digits()[0][1]
    assert float(torch.special.entr(torch.bincount(labels) / len(labels)).sum()) == pytest.approx(
        tasks()["cnn-sgd"].trivial, abs=1e-2
    )


def test_a_hidden_character_is_asked_for_and_no_other():
    source = MaskedCharacter(8, 24, 0.25)
    inputs, targets = next(source.batches(0))
    assert torch.equal(inputs == MASK, targets != IGNORED)
    assert 0.1 < float((inputs == MASK).double().mean()) < 0.4
    assert torch.equal(source.held_out[1], MaskedCharacter(8, 24, 0.25).held_out[1])


def test_digits_are_split_and_scaled():
    (images, labels), (held_out, answers) = digits()
    assert (len(labels), len(answers)) == (1198, 599)
    assert float(torch.cat([images, held_out]).mean()) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_is_the_textbook_one(causal, qk_norm):
    attention, x = SelfAttention(8, 2, causal), torch.randn(3, 5, 8)
    attention.qk_norm, attention.record = qk_norm, True
    q, k, v = (
        layer(x).reshape(3, 5, 2, 4).permute(0, 2, 1, 3)
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if qk_norm:
        q, k = (part / part.square().mean(-1, keepdim=True).sqrt() for part in (q, k))
    logits = torch.einsum("bhic,bhjc->bhij", q, k) / 2
    if causal:
        logits[..., torch.ones(5, 5).triu(1).bool()] = -math.inf
    mixed = (logits.softmax(-1) @ v).permute(0, 2, 1, 3).reshape(3, 5, 8)
    torch.testing.assert_close(attention(x), attention.o_proj(mixed))
    torch.testing.assert_close(attention.max_logit, logits.detach().amax(dim=(0, 2, 3)))
    assert not attention.max_logit.requires_grad


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_only_a_causal_network_ignores_what_comes_later(causal, post_norm):
    model = TextTransformer(10, 10, 6, Shape(width=8, layers=2, heads=2, causal=causal, post_norm=post_norm))
    characters = torch.randint(10, (1, 6))
    changed = characters.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 10
    same = torch.isclose(model(characters)[:, :-1], model(changed)[:, :-1], atol=1e-6).all()
    assert bool(same) is causal


def test_a_network_without_bias_has_only_that_of_the_head():
    model = TextTransformer(10, 10, 6, Shape(width=8, layers=1, heads=2, bias=False, table_std=0.02))
    assert [name for name, _ in model.named_parameters() if name.endswith("bias")] == ["head.bias"]
    assert float(model.character_embedding.weight.detach().std()) == pytest.approx(0.02, rel=0.3)


def test_waves_are_sines_and_cosines():
    found = waves(4, 6)
    assert found[3, 0] == pytest.approx(math.sin(3))
    assert found[3, 3] == pytest.approx(math.cos(3 / 10_000 ** (2 / 6)))


def test_a_recurrent_layer_is_drawn_like_linear_layers_of_its_size():
    torch.manual_seed(0)
    drawn = Recurrent(5, 5).state_dict()
    torch.manual_seed(0)
    twins = [nn.Linear(5, 20), nn.Linear(5, 20)]
    for side, twin in zip(("ih", "hh"), twins, strict=True):
        assert torch.equal(drawn[f"weight_{side}_l0"], twin.weight)
        assert torch.equal(drawn[f"bias_{side}_l0"], twin.bias)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")
def test_the_quick_muon_is_pytorchs_muon():
    ours = [torch.randn(shape).requires_grad_() for shape in [(8, 32), (32, 8), (16, 16), (16, 16)]]
    theirs, before = ([p.detach().clone().requires_grad_() for p in ours] for _ in range(2))
    quick, stock = StackedMuon(ours, 0.1), torch.optim.Muon(theirs, 0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        quick.step()
        stock.step()
    for p, q, start in zip(ours, theirs, before, strict=True):
        assert float((p - q).detach().norm()) < 0.02 * float((p - start).detach().norm())


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
def test_an_optimizer_resumes_bit_for_bit(kind):
    task = tasks()["gpt-preln-muon"]
    model = TextTransformer(96, 96, 32, Shape(width=8, layers=1, heads=2))
    optimizer = make_optimizer(kind, model, 1e-3)
    train(task, model, optimizer, 2)
    twin = TextTransformer(96, 96, 32, Shape(width=8, layers=1, heads=2))
    twin.load_state_dict(model.state_dict())
    resumed = make_optimizer(kind, twin, 5.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(task, model, optimizer, 2) == train(task, twin, resumed, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
def test_every_parameter_is_in_one_group_and_vectors_do_not_decay(kind):
    model = TextTransformer(10, 10, 6, Shape(width=8, layers=1, heads=2))
    groups = make_optimizer(kind, model, 1e-3, 0.5).param_groups
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    assert all(group["weight_decay"] == (0.5 if p.ndim > 1 else 0) for group in groups for p in group["params"])
    assert all(group["base_lr"] == group["lr"] == 1e-3 for group in groups)


def test_muon_takes_the_matrices_of_the_blocks():
    model = TextTransformer(10, 10, 6, Shape(width=8, layers=1, heads=2))
    optimizer = make_optimizer("muon", model, 1e-3)
    assert len(optimizer.parts[0].param_groups[0]["params"]) == 6


@pytest.mark.parametrize(("rate", "alive"), [("lr", True), ("early_lr", False)])
def test_the_deep_perceptron_learns_at_one_rate_and_dies_at_the_other(rate, alive):
    task = tasks()["mlp-adamw"]
    model = task.build()
    losses = train(task, model, make_optimizer(task.optimizer, model, getattr(task, rate)), 80)
    assert (sum(losses[-20:]) / 20 < 0.6 * task.trivial) is alive
