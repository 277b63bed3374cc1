# SPDX-License-Identifier: Apache-2.0
"""The suite's methods against their published formulas, worked out by hand, and all of them on one tiny network."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import pss_param as pss

BENCHMARKS = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the examples are in the repository only", allow_module_level=True)
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))

from suite.methods import METHODS  # noqa: E402
from suite.methods.attention import QKClip  # noqa: E402
from suite.methods.base import block_matrices  # noqa: E402
from suite.methods.clipping import GradientClipping, ZClip  # noqa: E402
from suite.methods.matrices import MSign, distance_to_orthogonal, matrix_sign  # noqa: E402
from suite.methods.rates import HalveRate  # noqa: E402
from suite.methods.reparametrised import SigmaReparam, SpectralNormalisation  # noqa: E402
from suite.methods.skipping import SkipOutliers  # noqa: E402
from suite.methods.triggers import AtRandom  # noqa: E402
from suite.task import tasks  # noqa: E402

WIDTH, HEADS, SYMBOLS, STEPS = 8, 2, 5, 5


class Attention(nn.Module):
    """Causal attention with what the methods ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.heads, self.qk_norm, self.record, self.max_logit = HEADS, False, False, None

    def logits(self, x):
        q, k = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q_proj, self.k_proj))
        if self.qk_norm:
            q, k = (nn.functional.rms_norm(part, part.shape[-1:]) for part in (q, k))
        return q @ k.mT / math.sqrt(WIDTH // HEADS)

    def forward(self, x):
        logits = self.logits(x)
        if self.record:
            self.max_logit = logits.detach().amax(dim=(0, 2, 3))
        v = self.v_proj(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return self.o_proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = Attention(), nn.LayerNorm(WIDTH)
        self.up_proj, self.down_proj = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.attention(x)
        return self.norm(x + self.down_proj(self.up_proj(x).relu()))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, text):
        x = self.embedding(text)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def loss(self, text):
        return nn.functional.cross_entropy(self(text).flatten(0, 1), text.roll(-1, 1).flatten())


def batches():
    generator = torch.Generator().manual_seed(1)
    return (torch.randint(SYMBOLS, (4, 6), generator=generator) for _ in itertools.count())


def train(method, steps=STEPS, lr=1e-2):
    """The loop of the suite, as its contract has it."""
    model = Transformer()
    method.prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), **{"lr": lr, "weight_decay": 0.1, **method.optimizer_options()})
    method.start(model, optimizer, steps)
    losses = []
    for step, batch in zip(range(steps), batches(), strict=False):
        optimizer.param_groups[0]["lr"] = lr * method.lr_scale(step)
        optimizer.zero_grad()
        loss, penalty = model.loss(batch), method.penalty()
        (loss if penalty is None else loss + penalty).backward()
        if method.before_step(step, loss.item()):
            optimizer.step()
        method.after_step(step)
        losses.append(loss.item())
    return model, losses


def one_weight(*values):
    """A module whose gradient has the values given."""
    module = nn.Linear(len(values), 1, bias=False)
    module.weight.grad = torch.tensor([values])
    return module


def fed(method, norms, losses=None):
    """What a method answers to these gradient norms in turn, and the norms that it leaves."""
    module = one_weight(0.0)
    method.start(module, torch.optim.SGD(module.parameters(), lr=1.0), len(norms))
    answers, left = [], []
    for step, norm in enumerate(norms):
        module.weight.grad = torch.tensor([[norm]])
        answers.append(method.before_step(step, losses[step] if losses else 1.0))
        left.append(module.weight.grad.item())
    return answers, left


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_a_transformer(name):
    method = METHODS[name]()
    assert method.fits(Transformer())
    model, losses = train(method)
    assert all(math.isfinite(loss) for loss in losses)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_whether_it_fits(name):
    perceptron = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
    needs_attention = name.startswith("qk-") or name.endswith(("-qk", "-attention", "-mlp"))
    assert METHODS[name]().fits(perceptron) != needs_attention


def test_makers_make_anew():
    for name, make in METHODS.items():
        first, second = make(), make()
        assert first is not second, name
        for of in (vars, lambda method: getattr(method, "options", {})):
            assert of(first).get("detector", 1) is not of(second).get("detector", 2), name


# Clipping.


def test_clip_limits_the_norm():
    module, method = one_weight(3.0, 4.0), GradientClipping()
    method.start(module, None, 1)
    assert method.before_step(0, 1.0)
    torch.testing.assert_close(module.weight.grad, torch.tensor([[0.6, 0.8]]), rtol=1e-5, atol=0)
    assert method.events == 1


def test_zclip_by_hand():
    # Two norms, 1 and 3: mean 2, population variance 1. Then 7: z = 5, allowed 2 + 2.5^2 / 5 = 3.25, which enters:
    # mean 0.97 * 2 + 0.03 * 3.25 = 2.0375, variance 0.97 + 0.03 * (3.25 - 2.0375)^2.
    method = ZClip(warmup_steps=2, limit=math.inf)
    _, left = fed(method, [1.0, 3.0, 7.0])
    assert left[:2] == [1.0, 3.0]
    assert left[2] == pytest.approx(3.25, rel=1e-5)
    assert method.mean == pytest.approx(2.0375, rel=1e-5)
    assert method.variance == pytest.approx(0.97 + 0.03 * 1.2125**2, rel=1e-5)
    assert method.events == 1


def test_zclip_leaves_usual_norms_and_has_its_fixed_limit():
    method = ZClip(warmup_steps=2, limit=math.inf)
    assert fed(method, [1.0, 3.0, 4.4])[1][2] == pytest.approx(4.4)  # z = 2.4
    assert method.mean == pytest.approx(0.97 * 2 + 0.03 * 4.4)
    assert fed(ZClip(), [5.0])[1] == pytest.approx([1.0], rel=1e-5)  # during the warm-up too


# Skipping.


def test_skip_compares_with_the_window_before_this_step():
    usual = [1.0, 3.0] * 32  # mean 2, deviation 64 / 63
    limit = 2 + 6 * math.sqrt(64 / 63)
    for last, expected in ((limit - 1e-3, True), (limit + 1e-3, False)):
        method = SkipOutliers()
        assert fed(method, [*usual, last])[0] == [True] * 64 + [expected]
        assert method.events == (not expected)
        assert fed(SkipOutliers(), [1.0] * 65, [*usual, last])[0][-1] == expected


def test_skip_waits_for_half_a_window_and_ignores_falls():
    assert all(fed(SkipOutliers(), [1.0, 3.0] * 31 + [99.0])[0])  # the 63rd step
    assert all(fed(SkipOutliers(), [100.0, 102.0] * 32 + [0.0])[0])


# Learning rates.


def test_a_spike_halves_the_rate_for_ever_but_not_twice_at_once():
    method = HalveRate()
    answers, left = fed(method, [1.0] * 10 + [4.0, 9.0] + [1.0] * 30)
    assert all(answers)
    assert left[10:12] == [4.0, 9.0]
    assert method.lr_scale(99) == 0.5
    fed(method, [50.0])
    assert method.lr_scale(99) == 0.25


def test_warm_up_ends_after_a_tenth():
    method = METHODS["warmup"]()
    method.start(nn.Linear(1, 1), None, 50)
    assert [method.lr_scale(step) for step in range(7)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0])


def test_no_weight_decay_reaches_the_optimizer():
    assert METHODS["no-weight-decay"]().optimizer_options() == {"weight_decay": 0.0}
    assert METHODS["nothing"]().optimizer_options() == {}


# Matrices.


def test_orthogonality_is_measured_on_the_smaller_side():
    assert float(distance_to_orthogonal(torch.eye(2, 5))) == 0.0
    assert float(distance_to_orthogonal(2 * torch.eye(5, 2))) == 2 * (4 - 1) ** 2
    assert float(distance_to_orthogonal(torch.tensor([[1.0, 1.0]]))) == 1.0  # (1 * 1 + 1 * 1 - 1)^2


def test_the_penalty_sums_over_the_block_matrices_and_has_gradients():
    model, method = Transformer(), METHODS["orthogonal"]()
    method.start(model, None, 1)
    penalty = method.penalty()
    weights = [p for name, p in model.named_parameters() if "layers." in name and p.dim() == 2]
    expected = sum(distance_to_orthogonal(weight) for weight in weights)
    torch.testing.assert_close(penalty, 1e-4 * expected)
    penalty.backward()
    assert all(weight.grad.abs().sum() > 0 for weight in weights)
    assert model.head.weight.grad is None


def test_msign_equalises_at_constant_frobenius_norm():
    W = torch.randn(6, 4)
    sign = matrix_sign(W)
    values = torch.linalg.svdvals(sign)
    torch.testing.assert_close(values, values.mean().expand(4))
    torch.testing.assert_close(sign.norm(), W.norm())
    torch.testing.assert_close(sign, pss.smooth(W, "equal"), rtol=1e-3, atol=1e-3)


def test_msign_acts_every_period_on_block_matrices_alone():
    model, method = Transformer(), MSign(period=3)
    method.start(model, None, 9)
    ranks, head = [], model.head.weight.detach().clone()
    for step in range(3):
        method.after_step(step)
        ranks.append(float(pss.stable_rank(model.layers[0].up_proj.weight.detach())))
    assert ranks[0] == ranks[1] < 7.0
    assert ranks[2] == pytest.approx(WIDTH, rel=1e-4)
    assert torch.equal(model.head.weight, head)
    assert method.events == 1


def test_msign_reaches_convolutions_and_survives_what_is_not_finite():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    before = model[0].weight.detach().clone()
    model[2].weight.data[0, 0, 0, 0] = math.inf
    method = MSign(period=1)
    method.start(model, None, 1)
    method.after_step(0)
    values = torch.linalg.svdvals(model[0].weight.detach().flatten(1))
    torch.testing.assert_close(values, values.mean().expand(4))
    torch.testing.assert_close(model[0].weight.norm(), before.norm())


def test_all_methods_mean_the_same_block_matrices():
    guard = pss.attach(Transformer())
    assert len(block_matrices(Transformer())) == len(guard.views) == 12


# Reparametrisations.


def test_spectral_normalisation_gives_every_block_matrix_norm_one():
    model, _ = train(SpectralNormalisation(), steps=30, lr=1e-3)
    model.eval()
    for block in block_matrices_of_parametrized(model):
        assert float(pss.spectral_norm(block.weight.detach())) == pytest.approx(1.0, abs=0.02)
    assert not nn.utils.parametrize.is_parametrized(model.head)


def block_matrices_of_parametrized(model):
    return [module for module in model.layers.modules() if isinstance(module, nn.Linear)]


def test_sigma_reparam_starts_as_the_plain_network_and_learns_one_scale_a_layer():
    model, text = Transformer(), next(batches())
    plain = model(text)
    SigmaReparam().prepare(model)
    torch.testing.assert_close(model(text), plain, rtol=1e-4, atol=1e-5)
    assert sum(name.endswith("gamma") for name, _ in model.named_parameters()) == 13  # 12 in blocks, and the head


@pytest.mark.parametrize("name", sorted(tasks()))
@pytest.mark.parametrize("method", [SpectralNormalisation, SigmaReparam])
def test_reparametrisations_reach_every_block_matrix_of_every_network(method, name):
    model = tasks()[name].build()
    blocks = block_matrices(model)
    assert blocks
    method().prepare(model)
    assert all(parametrize.is_parametrized(block.module, block.leaf) for block in blocks)
    batch = next(tasks()[name].batches(0))
    model.loss(batch).backward()
    assert all(block.module.parametrizations[block.leaf].original.grad.any() for block in blocks)


def test_sigma_reparam_by_hand():
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.diag(torch.tensor([4.0, 1.0]))
    SigmaReparam().prepare(layer)
    layer.parametrizations.weight[0].gamma.data.fill_(6.0)
    torch.testing.assert_close(layer.weight, torch.diag(torch.tensor([6.0, 1.5])))
    layer(torch.tensor([[1.0, 1.0]])).sum().backward()
    # d/dW of (6 / W00) (W00 + W11): the dominant value has no say, the other one 6 / 4.
    grad = layer.parametrizations.weight.original.grad
    torch.testing.assert_close(grad.diagonal(), torch.tensor([-6.0 / 16, 6.0 / 4]), rtol=1e-4, atol=1e-5)


def test_sigma_reparam_leaves_a_tied_head():
    model = Transformer()
    model.head.weight = model.embedding.weight
    SigmaReparam().prepare(model)
    assert model.head.weight is model.embedding.weight


# Attention.


def test_qk_norm_bounds_the_logits():
    model = Transformer()
    model.layers[0].attention.q_proj.weight.data.mul_(1e4)
    METHODS["qk-norm"]().prepare(model)
    largest = model.layers[0].attention.logits(torch.randn(2, 6, WIDTH)).detach().abs().max()
    assert float(largest) <= math.sqrt(WIDTH // HEADS) + 1e-4


def test_qk_clip_brings_the_largest_logit_down_to_the_threshold_head_by_head():
    model, text, method = Transformer(), next(batches()), QKClip(threshold=100.0)
    attention = model.layers[1].attention
    for layer in (attention.q_proj, attention.k_proj):
        layer.weight.data[: WIDTH // HEADS].mul_(60.0)
        layer.bias.data[: WIDTH // HEADS].mul_(60.0)
    method.start(model, None, 1)
    model(text)
    assert attention.max_logit[0] > 100 > attention.max_logit[1]
    quiet = attention.max_logit[1].clone()
    method.after_step(0)
    model(text)
    torch.testing.assert_close(attention.max_logit, torch.stack([torch.tensor(100.0), quiet]), rtol=1e-4, atol=1e-4)
    assert method.events == 1


# Smoothing.


def test_forms_without_a_detector_fire_when_they_should():
    events = {name: METHODS[name]() for name in ("pss-always", "pss-periodic", "pss-default")}
    for method in events.values():
        train(method, steps=21, lr=1e-4)
    assert {name: method.events for name, method in events.items()} == {
        "pss-always": 21,
        "pss-periodic": 1,
        "pss-default": 0,
    }


def test_random_triggers_are_rare_seeded_and_resumable(global_random_state_untouched):
    def fires(detector, steps):
        return [detector.judge(1.0, []).triggered for _ in range(steps)]

    whole = fires(AtRandom(0.01), 3000)
    assert 15 <= sum(whole) <= 45
    assert fires(AtRandom(0.01, seed=1), 3000) != whole
    first, second = AtRandom(0.01), AtRandom(0.01)
    start = fires(first, 1000)
    second.load_state_dict(first.state_dict())
    assert start + fires(second, 2000) == whole


def test_the_published_form_is_what_its_name_says():
    method = METHODS["pss-published"]()
    assert (method.options["smoothing"], method.options["edge"], method.options["targets"]) == (
        "clip",
        "dominant",
        "linear",
    )
    assert method.options["detector"].threshold == 2.5
    assert METHODS["pss-default"]().options == {}
    assert METHODS["pss-threshold-1.5"]().options["detector"].threshold == 1.5
    assert METHODS["pss-decay-0.99"]().options["detector"].decay == 0.99


def test_the_guard_drops_gradients_that_are_not_finite_and_then_gives_up():
    model, method = Transformer(), METHODS["pss-published"]()
    method.start(model, None, 20)
    for step in range(20):
        model.zero_grad()
        (model.loss(next(batches())) * math.inf).backward()
        if step < 19:
            assert not method.before_step(step, 1.0)
    with pytest.raises(pss.NonFiniteError):
        method.before_step(19, 1.0)
    assert method.events == 0
