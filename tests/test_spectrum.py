# SPDX-License-Identifier: Apache-2.0
"""Spectra against float64 ``torch.linalg``."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import corpus, exact_bulk_level, exact_clip, gaussian, power, with_spectrum

from pss_param import solver
from pss_param.errors import ArgumentError, NonFiniteError
from pss_param.estimate import stable_rank_estimate, stable_rank_estimates
from pss_param.spectrum import (
    STABLE_RANK_SLACK,
    dominant_directions,
    spectral_norm,
    stable_rank,
)

CORPUS = corpus()
pytestmark = pytest.mark.usefixtures("both_engines")


def exact_k(W: torch.Tensor) -> int:
    S = torch.linalg.svdvals(W.double())
    if S[0] == 0:
        return 0
    sr = float((S / S[0]).square().sum())
    return min(math.floor(sr * (1 + STABLE_RANK_SLACK)), min(W.shape) - 1)


def smoothed(found, W):
    """The clipped matrix in float64, free of any rounding of ours."""
    d = (found.S - found.edge[..., None]).clamp_min(0).double()
    return W.double() - (found.U.double() * d[..., None, :]) @ found.Vh.double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CORPUS)
def test_dominant_directions_agree_with_float64_svd(name, dtype, global_random_state_untouched):
    if dtype == torch.float16 and name in ("huge", "tiny"):
        pytest.skip("does not fit float16")
    W = CORPUS[name].to(dtype)
    S = torch.linalg.svdvals(W.double())
    found = dominant_directions(W)
    assert int(found.k) == exact_k(W)
    k = int(found.k)
    torch.testing.assert_close(found.S.double(), S[:k], rtol=2e-3, atol=1e-4 * float(S[0]))
    edge = float(S[k]) if k < S.numel() else 0.0
    assert float(found.edge) == pytest.approx(edge, abs=1e-3 * float(S.norm()) + 1e-38)
    norm = float(S.norm())
    error = float((smoothed(found, W) - exact_clip(W, k=k)).norm())
    assert error <= float(found.error) * norm + 1e-12 * norm, "the certificate did not hold"
    assert bool(found.converged)
    assert error <= 1e-3 * norm


@pytest.mark.parametrize("name", CORPUS)
def test_residuals_are_what_they_claim(name):
    W = CORPUS[name].float()
    found = dominant_directions(W)
    scale = float(found.spectral_norm) or 1.0
    left = (W @ found.Vh.mT - found.U * found.S).double().norm(dim=0) / scale
    right = (W.mT @ found.U - found.Vh.mT * found.S).double().norm(dim=0) / scale
    assert (torch.maximum(left, right) <= found.residual.double() * 1.05 + 2e-5).all()
    k = int(found.k)
    if k:
        identity = torch.eye(k)
        torch.testing.assert_close(found.U.mT @ found.U, identity, rtol=0, atol=1e-3)
        torch.testing.assert_close(found.Vh @ found.Vh.mT, identity, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CORPUS)
@pytest.mark.parametrize("fraction", [0.9, 0.5, 0.2])
def test_above_finds_every_value_over_a_level(name, fraction):
    W = CORPUS[name].float()
    S = torch.linalg.svdvals(W.double())
    level = fraction * float(S[0])
    if (S / S[0].clamp_min(1e-300) - fraction).abs().min() < 1e-4:
        level *= 1.001
    found = dominant_directions(W, above=level)
    assert int(found.k) == int((S > level).sum())


@pytest.mark.parametrize("name", CORPUS)
def test_bulk_is_a_fixed_point(name):
    W = CORPUS[name].float()
    found = dominant_directions(W, above="bulk")
    S = torch.linalg.svdvals(W.double())
    exact = exact_bulk_level(W)
    if exact <= 3e-5 * float(S[0]):  # lost in float32's rounding of S[0]
        assert float(found.bulk_edge) == 0.0
        return
    assert float(found.bulk_edge) == pytest.approx(exact, rel=2e-3)
    assert abs(int(found.k) - int((S > exact).sum())) <= 1


@given(seed=st.integers(0, 10**6), m=st.integers(1, 40), n=st.integers(1, 40), exponent=st.floats(-6, 6))
@settings(max_examples=60, deadline=None)
def test_stable_rank_and_norm_match_their_definitions(seed, m, n, exponent):
    W = gaussian(m, n, seed) * 10.0**exponent
    S = torch.linalg.svdvals(W)
    assert float(spectral_norm(W)) == pytest.approx(float(S[0]), rel=1e-4)
    assert float(stable_rank(W)) == pytest.approx(float((S / S[0]).square().sum()), rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"above": 0.5}, {"above": "bulk"}], ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (100, 110), (200, 230), (230, 200), (300, 320)], ids=str)
def test_zero_matrix(shape, options):
    m, n = shape
    W = torch.zeros(2, m, n)
    assert stable_rank(W).tolist() == [0.0, 0.0]
    assert spectral_norm(W).tolist() == [0.0, 0.0]
    found = dominant_directions(W, **options)
    assert (found.U.shape, found.Vh.shape) == ((2, m, 0), (2, 0, n))
    assert bool(found.converged.all())


def test_batches_of_different_k_are_padded_with_zeros_and_agree_with_single_calls():
    batch = (
        torch.stack([with_spectrum(180, 220, power(180, p)) for p in (0.3, 0.7, 2.0)]).float().reshape(3, 1, 180, 220)
    )
    found = dominant_directions(batch)
    assert found.k.shape == (3, 1)
    for i in range(3):
        alone = dominant_directions(batch[i, 0])
        k = int(alone.k)
        assert k == int(found.k[i, 0])
        torch.testing.assert_close(found.S[i, 0, :k], alone.S, rtol=1e-4, atol=0)
        assert not found.S[i, 0, k:].any()
        assert not found.U[i, 0, :, k:].any()


def test_same_input_gives_same_bits_whatever_the_global_seed(global_random_state_untouched):
    W = with_spectrum(300, 250, power(250, 0.7)).float()
    first = dominant_directions(W)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    second = dominant_directions(W)
    torch.set_rng_state(state)
    assert torch.equal(first.U, second.U)
    assert torch.equal(first.Vh, second.Vh)


@pytest.mark.parametrize("shape", [(256, 64), (230, 256), (600, 400), (900, 800)], ids=str)
def test_where_a_matrix_lies_in_memory_changes_no_bit(shape):
    W = with_spectrum(*shape, power(min(shape), 0.7)).float()
    if solver.on_gpu(W):
        pytest.skip("what starts anywhere is copied for a CPU's BLAS")
    found = []
    for offset in (0, 1, 3, 16):
        place = torch.empty(W.numel() + 16)[offset : offset + W.numel()].view(shape)
        place.copy_(W)
        found.append(dominant_directions(place))
    assert all(torch.equal(one.U, found[0].U) and torch.equal(one.Vh, found[0].Vh) for one in found)


def test_scaling_by_a_power_of_two_changes_no_bit():
    W = with_spectrum(300, 250, power(250, 0.7)).float()
    plain, scaled = dominant_directions(W), dominant_directions(W * 2.0**20)
    assert torch.equal(plain.U, scaled.U)
    assert torch.equal(plain.S * 2.0**20, scaled.S)


def test_own_generator_is_used_and_advanced():
    W = with_spectrum(320, 300, power(300, 1.0)).float()
    g = torch.Generator().manual_seed(7)
    first, second = dominant_directions(W, generator=g), dominant_directions(W, generator=g)
    again = dominant_directions(W, generator=torch.Generator().manual_seed(7))
    assert torch.equal(first.U, again.U)
    assert not torch.equal(first.U, second.U)


def test_a_tolerance_out_of_reach_is_reported():
    found = dominant_directions(gaussian(60, 60).float(), rank=5, tol=1e-9)
    assert not bool(found.converged)


def test_transposed_and_strided_inputs():
    W = with_spectrum(300, 200, power(200, 0.7)).float()
    wide = torch.cat([W, W], dim=1)[:, :200]
    torch.testing.assert_close(dominant_directions(wide).S, dominant_directions(W).S, rtol=1e-4, atol=0)
    torch.testing.assert_close(dominant_directions(W.T).S, dominant_directions(W).S, rtol=1e-3, atol=0)


def test_a_warm_start_gives_the_same_answer():
    W = with_spectrum(400, 300, power(300, 0.5)).float()
    cold = dominant_directions(W)
    warm = dominant_directions(W, init=cold.Vh.mT)
    assert int(warm.k) == int(cold.k)
    torch.testing.assert_close(warm.S, cold.S, rtol=1e-3, atol=0)


def test_a_start_wider_than_the_iteration_may_become_is_left_aside(monkeypatch):
    def refused(*args: object, **options: object) -> None:
        raise AssertionError("iterated from a start that wants the whole spectrum")

    W = gaussian(512, 512).float()
    cold = dominant_directions(W)
    monkeypatch.setattr("pss_param.solver._iterate", refused)
    warm = dominant_directions(W, init=cold.Vh.mT)
    assert torch.equal(warm.Vh, cold.Vh)


@pytest.mark.parametrize(
    ("W", "options"),
    [
        (torch.zeros(3), {}),
        (torch.zeros(3, 0), {}),
        (torch.zeros(3, 3, dtype=torch.int64), {}),
        ("text", {}),
        (torch.eye(3), {"rank": -1}),
        (torch.eye(3), {"rank": 1.5}),
        (torch.eye(3), {"rank": 1, "above": 0.5}),
        (torch.eye(3), {"above": -1.0}),
        (torch.eye(3), {"above": "top"}),
        (torch.eye(3), {"above": torch.ones(4)}),
        (torch.eye(3), {"tol": 0.0}),
    ],
)
def test_wrong_arguments_raise_our_error(W, options):
    with pytest.raises(ArgumentError):
        dominant_directions(W, **options)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_input_raises(bad):
    W = torch.ones(4, 5, 6)
    W[2, 3, 4] = bad
    with pytest.raises(NonFiniteError):
        dominant_directions(W)


@pytest.mark.parametrize("name", CORPUS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_an_estimate_is_never_below_the_stable_rank_and_comes_down_to_it(name, dtype, global_random_state_untouched):
    if name in ("huge", "tiny") and dtype == torch.float32:
        pytest.skip("squares of the norm leave float32")
    W, x, seen = CORPUS[name].to(dtype), None, []
    exact = float(stable_rank(W))
    for step in range(60):
        estimate, x = stable_rank_estimate(W if step % 2 == 0 else W.mT, x)
        seen.append(float(estimate))
    if name == "zero":
        assert math.isnan(seen[-1])
        return
    assert min(seen) >= exact * (1 - 3e-4)
    assert seen[-1] <= exact * 1.2
    assert all(late <= early * (1 + 1e-4) for early, late in pairwise(seen))


def test_estimates_of_a_batch_are_those_of_its_matrices():
    W = torch.stack([gaussian(20, 30, seed) for seed in range(6)]).float().reshape(2, 3, 20, 30)
    together = stable_rank_estimate(W)
    assert together.stable_rank.shape == (2, 3)
    assert together.vector.shape == (2, 3, 20, 1)
    alone = torch.stack([stable_rank_estimate(one).stable_rank for one in W.reshape(6, 20, 30)])
    torch.testing.assert_close(together.stable_rank.reshape(6), alone)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_an_estimate_recovers_from_a_weight_that_was_no_weight(bad):
    x = stable_rank_estimate(torch.full((12, 12), bad)).vector
    assert torch.isfinite(x).all()
    W = with_spectrum(12, 12, power(12, 1.0)).float()
    for step in range(40):
        estimate, x = stable_rank_estimate(W.mT if step % 2 == 0 else W, x)
    assert float(estimate) == pytest.approx(float(stable_rank(W)), rel=1e-3)


def test_a_look_inside_of_autocast_has_the_same_bits():
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(24, n, generator=generator) for n in (24, 32)]
    starts = [torch.ones(matrix.shape[1], 1) for matrix in matrices]
    plain = stable_rank_estimates(matrices, starts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = stable_rank_estimates(matrices, starts)
    assert torch.equal(plain.stable_ranks, inside.stable_ranks)
    assert inside.vectors[0].dtype == torch.float32


def test_more_directions_than_the_rank_are_finite():
    g = torch.Generator().manual_seed(0)
    u, v = (torch.randint(1, 5, (size, 1), generator=g).float() for size in (300, 280))
    W = u @ v.mT
    found = dominant_directions(W, rank=10, init=v / v.norm())
    assert float(found.U.abs().max()) < 2
    assert float(found.Vh.abs().max()) < 2
    torch.testing.assert_close((found.U * found.S) @ found.Vh, W, rtol=1e-3, atol=1e-3)


def test_what_is_left_of_a_norm_is_known_no_better_than_float32_knows_it():
    S = power(300, 0.82)
    S[0] = 1522.0
    for seed in range(12):
        W = with_spectrum(300, 300, S, seed).float()
        found = dominant_directions(W, rank=10)
        assert float((smoothed(found, W) - exact_clip(W, k=10)).norm() / W.double().norm()) <= float(found.error)


@pytest.mark.parametrize("scale", [1e-44, 1e-40, 1e-38, 1e-35, 1e34, 1e37])
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_norms_at_the_ends_of_float32(scale, batch):
    W = with_spectrum(300, 290, power(290, 1.0)).float().expand(*batch, 300, 290)
    plain, scaled = dominant_directions(W, rank=3), dominant_directions((W.double() * scale).float(), rank=3)
    assert bool(torch.isfinite(scaled.U).all())
    if scale >= 1e-37:  # below there are few digits
        torch.testing.assert_close(scaled.S.double() / scale, plain.S.double(), rtol=1e-3, atol=0)


def test_a_start_of_no_numbers_is_refused():
    with pytest.raises(NonFiniteError, match="init must be finite"):
        dominant_directions(torch.randn(300, 280), init=torch.full((280, 4), math.nan))


@pytest.mark.parametrize("shape", [(300, 320), (40, 50), (3, 30, 40), (200, 700)], ids=str)
@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"above": "bulk"}, {"rank": 0}], ids=str)
def test_gradients_pass_by_what_was_found(shape, options):
    """Tensors of inference mode, which the solver works in, may not be saved for a backward pass."""
    found = dominant_directions(gaussian(*shape).float(), **options)
    scale = torch.ones((), requires_grad=True)
    fields = [part for part in vars(found).values() if part.is_floating_point() and part.numel()]
    sum((scale * part.nan_to_num()).sum() for part in fields).backward()
    assert not any(part.is_inference() for part in vars(found).values())
    assert torch.isfinite(scale.grad)


@pytest.mark.parametrize("batch", [(0,), (2, 0)])
def test_a_batch_of_nothing(batch):
    found = dominant_directions(torch.empty(*batch, 8, 6))
    assert found.U.shape == (*batch, 8, 0)
    assert found.Vh.shape == (*batch, 0, 6)
    assert found.k.shape == found.edge.shape == found.converged.shape == batch
