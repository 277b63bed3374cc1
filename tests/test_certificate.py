# SPDX-License-Identifier: Apache-2.0
"""The bounds hold against full decompositions, at every stage of an iteration that has not converged."""

from __future__ import annotations

import math

import pytest
import torch
from spectra import corpus, exact_clip

from pss_param.certificate import Request, Spectrum, bulk_level, judge, stable_rank_of
from pss_param.krylov import Krylov

WIDE_ENOUGH = [name for name, W in corpus().items() if min(W.shape) >= 90 and name not in ("zero", "rank one")]


def stages(W: torch.Tensor, steps: int):
    norm = torch.linalg.matrix_norm(W).reshape(1)
    krylov = Krylov(W[None], norm, torch.Generator().manual_seed(3))
    krylov.start(16, None)
    for _ in range(steps):
        ritz = krylov.ritz()
        yield krylov, ritz
        krylov.expand(0, krylov.next_columns)


@pytest.mark.parametrize("name", WIDE_ENOUGH)
def test_measured_residuals_are_the_residuals(name):
    W = corpus()[name].contiguous()
    W = W if W.shape[0] >= W.shape[1] else W.mT
    scaled = W / torch.linalg.matrix_norm(W)
    for krylov, ritz in stages(W, 3):
        U, S, Vh = krylov.triplets(ritz, 0, krylov.rank)
        keep = S > 1e-6
        true = torch.linalg.vector_norm((scaled.mT @ U - Vh.mT * S)[:, keep], dim=0)
        torch.testing.assert_close(ritz.residual[0][keep], true, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("name", WIDE_ENOUGH)
def test_ceilings_are_above_the_true_values(name):
    W = corpus()[name].contiguous()
    W = W if W.shape[0] >= W.shape[1] else W.mT
    true = torch.linalg.svdvals(W / torch.linalg.matrix_norm(W))
    checked = 0
    for krylov, ritz in stages(W, 4):
        reference = float(ritz.S[0, 4])
        ceilings = krylov.ceilings(ritz, 0, reference)
        for value, ceiling in zip(true.tolist(), ceilings or [], strict=False):
            if value > reference * (1 + 1e-9):
                checked += 1
                assert ceiling >= value * (1 - 1e-9)
    assert checked or name in ("flat", "flat tall", "identity", "repeated", "clustered top", "rank deficient")


@pytest.mark.parametrize("name", WIDE_ENOUGH)
def test_the_error_bound_holds_before_convergence(name):
    W = corpus()[name].contiguous()
    W = W if W.shape[0] >= W.shape[1] else W.mT
    norm = torch.linalg.matrix_norm(W)
    for krylov, ritz in stages(W, 4):
        k = 3
        seen = Spectrum(
            ritz.S[0].tolist(), ritz.residual[0].tolist(), tuple(W.shape), krylov.rank >= min(W.shape), 2e-16
        )
        verdict = judge(seen, Request(rank=k))
        U, S, Vh = krylov.triplets(ritz, 0, k)
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
