# SPDX-License-Identifier: Apache-2.0
"""The bounds hold against full decompositions, at every stage of an iteration that has not converged."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from spectra import corpus, exact_clip

from pss_param.certificate import Request, Spectrum, bulk_level, judge, stable_rank_of
from pss_param.krylov import Krylov

WIDE_ENOUGH = [name for name, W in corpus().items() if min(W.shape) >= 90 and name not in ("zero", "rank one")]


REPEATED = {"clustered top": 18, "repeated": 36}


def tall(name: str) -> torch.Tensor:
    W = corpus()[name].contiguous()
    return W if W.shape[0] >= W.shape[1] else W.mT.contiguous()


def stages(W: torch.Tensor, steps: int, width: int = 16, seed: int = 3):
    """Iterations after each of their passes, until the basis would fill the smaller side."""
    norm = torch.linalg.matrix_norm(W).reshape(1)
    for left in (False, True):
        krylov = Krylov(W[None], norm, seed)
        if left:
            krylov.start_left(krylov.left_sketch(width))
        else:
            krylov.start(krylov.right_sketch(width))
        for _ in range(steps):
            yield krylov, krylov.ritz()
            if krylov.rank + 2 * width > min(W.shape):
                break
            krylov.advance()


@pytest.mark.parametrize("name", WIDE_ENOUGH)
def test_residuals_are_below_their_bounds_and_exact_on_the_other_side(name):
    W = tall(name)
    scaled = W / torch.linalg.matrix_norm(W)
    for krylov, ritz in stages(W, 5):
        U, S, Vh = krylov.triplets(ritz, 0, len(ritz.S[0]))
        keep = S > 1e-6
        left = torch.linalg.vector_norm((scaled @ Vh.mT - U * S)[:, keep], dim=0)
        right = torch.linalg.vector_norm((scaled.mT @ U - Vh.mT * S)[:, keep], dim=0)
        zero, true = (right, left) if ritz.L is not None else (left, right)
        assert float(zero.max()) < 1e-8
        assert (true <= torch.tensor(ritz.residual[0], dtype=torch.float64)[keep] * (1 + 1e-6) + 1e-9).all()


@pytest.mark.parametrize("name", WIDE_ENOUGH)
@pytest.mark.parametrize("width", [8, 16, 32])
def test_what_no_pass_has_seen_is_below_its_bound(name, width):
    if name in REPEATED and width <= REPEATED[name]:
        pytest.skip("the start must be wider than the wanted set: Note [Width of the block]")
    W = tall(name)
    scaled = W / torch.linalg.matrix_norm(W)
    for seed in range(4):
        for krylov, ritz in stages(W, 8, width, seed):
            U, _, Vh = krylov.triplets(ritz, 0, len(ritz.S[0]))
            unseen = scaled - (scaled @ Vh.mT @ Vh if ritz.L is None else U @ (U.mT @ scaled))
            assert float(torch.linalg.matrix_norm(unseen, 2)) <= math.sqrt(ritz.rest[0]) * 1.01 + 1e-12


@pytest.mark.parametrize("name", WIDE_ENOUGH)
def test_ceilings_are_above_the_true_values(name):
    W = tall(name)
    true = torch.linalg.svdvals(W / torch.linalg.matrix_norm(W))
    checked = 0
    for krylov, ritz in stages(W, 6):
        reference = ritz.S[0][4]
        ceilings = krylov.core.ceilings(ritz, {0: reference}).get(0, [])
        for value, ceiling in zip(true.tolist(), ceilings, strict=False):
            if value > reference * (1 + 1e-9):
                checked += 1
                assert ceiling >= value * (1 - 1e-9)
    assert checked or name in ("flat", "flat tall", "identity", "repeated", "clustered top", "rank deficient")


@pytest.mark.parametrize("name", WIDE_ENOUGH)
def test_the_error_bound_holds_before_convergence(name):
    W = tall(name)
    norm = torch.linalg.matrix_norm(W)
    for krylov, ritz in stages(W, 6):
        k = 3
        seen = Spectrum(ritz.S[0], ritz.residual[0], tuple(W.shape), krylov.complete, 2e-16)
        U, S, Vh = krylov.triplets(ritz, 0, k)
        plain = judge(seen, Request(rank=k))
        raised = krylov.core.ceilings(ritz, {0: plain.edge}).get(0)
        for verdict in (plain, judge(replace(seen, ceilings=raised), Request(rank=k))):
            smoothed = W - norm * (U * (S - verdict.edge)) @ Vh
            assert float((smoothed - exact_clip(W, k=k)).norm() / norm) <= verdict.error * (1 + 1e-6)


@pytest.mark.parametrize(("top", "expected"), [(0.0, 0.0), (1.0, 1.0), (0.5, 4.0), (1.0 + 1e-9, 1.0)])
def test_stable_rank_of_a_scaled_matrix(top, expected):
    assert stable_rank_of(top) == expected


@pytest.mark.parametrize("count", [2, 7, 20])
def test_an_integer_stable_rank_counts_as_that_integer_on_either_side_of_rounding(count):
    for nudge in (1 - 1e-7, 1.0, 1 + 1e-7):
        values = [nudge / math.sqrt(count)] * count + [0.0] * 10
        seen = Spectrum(values, [0.0] * len(values), (40, 40), complete=True, eps=1e-7)
        assert judge(seen, Request()).k == count


def test_a_partial_spectrum_gives_an_upper_bound_of_the_bulk_edge():
    S = torch.linalg.svdvals(torch.diag(torch.tensor([9.0, 5.0] + [1.0] * 98, dtype=torch.float64)))
    S = (S / S.norm()).tolist()
    levels = [bulk_level(Spectrum(S[:r], [0.0] * r, (100, 100), complete=False, eps=2e-16)) for r in (1, 2, 3, 10)]
    full = bulk_level(Spectrum(S, [0.0] * 100, (100, 100), complete=True, eps=2e-16))
    assert levels == sorted(levels, reverse=True)
    assert all(level >= full * (1 - 1e-12) for level in levels)
    assert levels[-1] == pytest.approx(full)


def rayleigh_ritz(W, V):
    """Triplets on a right subspace, and the residuals of the left side, ``W V = U S`` being exact."""
    U, S, rotation = torch.linalg.svd(W @ V, full_matrices=False)
    V = V @ rotation.mT
    return U, S, V, torch.linalg.vector_norm(W.mT @ U - V * S, dim=0)


@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("cluster", [0.0, 1e-3, 0.1])
def test_the_formula_bounds_the_error_of_any_subspace_that_misses_nothing(noise, cluster):
    """Values crowd on both sides of the edge, and the subspace is as far off as the noise; no iteration takes part."""
    sizes = []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        S = torch.cat([torch.tensor([1.0, 0.9]).double(), 0.3 + cluster * draw(4).abs(), 0.1 * draw(30).abs()])
        S = S.sort(descending=True).values / torch.linalg.vector_norm(S)
        left, right = (torch.linalg.qr(draw(rows, len(S))).Q for rows in (40, 50))
        W = (left * S) @ right.mT
        start = right[:, :12] + noise * draw(50, 12) / 50**0.5
        U, values, V, residual = rayleigh_ritz(W, torch.linalg.qr(start).Q)
        seen = Spectrum(values.tolist(), residual.tolist(), (40, 50), complete=False, eps=1e-12)
        k = 1 + seed % 6
        verdict = judge(seen, Request(rank=k))
        exact = (left[:, :k] * (S[:k] - S[k])) @ right[:, :k].mT
        error = float(torch.linalg.matrix_norm((U[:, :k] * (values[:k] - values[k])) @ V[:, :k].mT - exact))
        assert error <= verdict.error
        sizes.append(verdict.error / max(error, 1e-12))
    assert sorted(sizes)[len(sizes) // 2] < 100  # a bound, and no empty one


def test_what_is_hidden_is_no_larger_than_what_the_edge_may_be_off():
    S, residual = [0.9, 0.3, 0.1, 0.05], [1e-6, 1e-2, 1e-2, 1e-2]
    verdict = judge(Spectrum(S, residual, (99, 99), complete=False, eps=1e-12), Request(rank=1))
    off = (1e-6**2 + 1e-2**2) / (0.3 - 0.1 - 1e-2)  # the quadratic bound, to the next value outside
    assert verdict.error == pytest.approx(1e-6 + 2 * off, rel=1e-6)
