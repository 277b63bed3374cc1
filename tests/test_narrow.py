# SPDX-License-Identifier: Apache-2.0
"""Many values by a narrow block: what it finds, what it may not see, and when it gives way to the Gram matrix."""

from __future__ import annotations

import math

import pytest
import torch
from spectra import power, with_spectrum

import pss_param as pss
from pss_param import narrow, solver
from pss_param.certificate import Request, Verdict
from pss_param.core import Ritz
from pss_param.krylov import Krylov

SHAPE = 420, 360


@pytest.fixture
def served(monkeypatch):
    """Small matrices too, and whether a narrow block had the last word on each."""
    for name in ("_LARGE", "_COLUMNS_OF_ONE", "_COLUMNS_OF_NONE"):
        monkeypatch.setattr(narrow, name, 0)
    monkeypatch.setattr(solver, "_WIDEST", 2)
    words = []

    def deepen(*asked):
        found = narrow.deepen(*asked)
        words.append(found[1] is not None)
        return found

    monkeypatch.setattr(solver, "deepen", deepen)
    return words


def trained(seed=0):
    """A few dozen dominant values that crowd around the edge, over a bulk."""
    j = torch.arange(1, SHAPE[1] + 1, dtype=torch.float64)
    return with_spectrum(*SHAPE, torch.where(j < 60, 1 + 3 * j**-0.5, 1.3 * (1 - j / 400)), seed=seed)


def plateau(count, width, rest=0.4, seed=0):
    """So many values within a share ``width`` of the largest, far above the others."""
    top = 1 - width * torch.linspace(0, 1, count, dtype=torch.float64)
    below = rest * torch.linspace(1, 0.1, SHAPE[1] - count, dtype=torch.float64)
    return with_spectrum(*SHAPE, torch.cat([top, below]), seed=seed)


def error_of(W, found):
    """Of the smoothed matrix, over the norm of the matrix, by float64's singular values."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    k = int(found.k)
    exact = (U[:, :k] * (S[:k] - S[k])) @ Vh[:k]
    ours = (found.U.double() * (found.S - found.edge).double()) @ found.Vh.double()
    return float((exact - ours).norm() / S.norm())


@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("rank", [None, 12, 25])
@pytest.mark.parametrize("wide", [False, True])
def test_many_values_that_crowd_around_the_edge(served, rank, tol, wide):
    W = trained().float()
    W = W.mT if wide else W
    found = pss.dominant_directions(W, rank, tol=tol)
    assert served == [True] or tol == 1e-4
    S = torch.linalg.svdvals(W.double())
    assert int(found.k) == (rank or math.floor(float((S / S[0]).square().sum()))) > 10
    assert error_of(W, found) <= float(found.error) <= tol
    torch.testing.assert_close(found.U.mT @ found.U, torch.eye(int(found.k)), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.Vh @ found.Vh.mT, torch.eye(int(found.k)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [0.0, 1e-6, 1e-3, 5e-3])
@pytest.mark.parametrize("rank", [None, 14, 17, 22])
def test_copies_that_a_block_may_not_see(served, rank, width):
    W = plateau(22, width)
    found = pss.dominant_directions(W, rank, tol=1e-3)
    assert served == [rank == 14 and width <= 1e-6] or width == 1e-6
    assert error_of(W, found) <= float(found.error) <= 1e-3


def test_copies_that_a_block_cannot_see_are_left_to_the_gram_matrix(served, monkeypatch):
    W = with_spectrum(*SHAPE, torch.cat([torch.ones(22).double(), 0.3 * power(SHAPE[1] - 22, 1.0)]))
    found = pss.dominant_directions(W, 19, tol=1e-2)
    assert served == [False]
    assert error_of(W, found) <= float(found.error) <= 1e-2
    monkeypatch.setattr(narrow, "hidden", lambda *_: 0.0)
    found = pss.dominant_directions(W, 19, tol=1e-2)
    assert served == [False, True]
    assert error_of(W, found) > 10 * float(found.error)


@pytest.mark.parametrize("width", [0.02, 0.05, 0.1, 0.3])
@pytest.mark.parametrize("count", [17, 24, 40])
@pytest.mark.parametrize("tol", [3e-2, 1e-3])
def test_copies_that_are_apart_come_out_in_time(served, count, width, tol):
    for seed, rank in enumerate((None, 12, 14, 20)):
        W = plateau(count, width, seed=seed)
        found = pss.dominant_directions(W, rank, tol=tol)
        assert error_of(W, found) <= float(found.error) <= tol
    assert any(served) or count == 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fewer_directions_than_are_asked_for(served, dtype):
    W = with_spectrum(*SHAPE, torch.cat([power(5, 0.5), torch.zeros(355, dtype=torch.float64)])).to(dtype)
    found = pss.dominant_directions(W, 30, tol=1e-3)
    assert served == [True]
    assert bool(found.converged)
    torch.testing.assert_close((found.U * found.S) @ found.Vh, W, rtol=0, atol=1e-4)


def test_what_is_known_from_before_is_no_random_column(served):
    values = torch.cat([torch.ones(12), torch.linspace(0.9, 0.5, 60), torch.linspace(0.4, 0.1, SHAPE[1] - 72)]).double()
    W = with_spectrum(*SHAPE, values)
    known = torch.linalg.svd(W).Vh[12:22].mT
    found = pss.dominant_directions(W, 40, tol=1e-2, init=known)
    torch.testing.assert_close(found.S[:13], values[:13], rtol=1e-4, atol=0)
    assert error_of(W, found) <= float(found.error) <= 1e-2


@pytest.mark.parametrize("known", ["none of them", "others"])
def test_a_start_that_leads_nowhere_gives_way_to_a_narrow_block(known, served):
    W = trained()
    others = torch.linalg.svd(W).Vh[40:65].mT  # W moves nothing out of their span
    found = pss.dominant_directions(
        W, 25, tol=1e-3, init=torch.eye(SHAPE[1], 25).double() if known != "others" else others
    )
    assert served == [True]
    assert error_of(W, found) <= float(found.error) <= 1e-3


@pytest.mark.parametrize(("S", "residual", "expected"), [
    ([1.0] * 4 + [0.5, 0.4], 0.0, True),
    ([1.0, 0.98, 0.96, 0.95, 0.5, 0.4], 0.0, False),
    ([1.0, 0.98, 0.96, 0.95, 0.5, 0.4], 0.02, True),
    ([1.0, 0.9, 0.8, 0.7, 0.5, 0.4], 0.2, False),
    ([1.0, 0.4, 0.4, 0.4, 0.4, 0.4], 0.0, False),
])  # fmt: skip
def test_values_that_are_close_and_above_the_edge_may_stand_for_more(S, residual, expected):
    nothing = torch.empty(0)
    ritz = Ritz([S], [[residual] * len(S)], [0.0], nothing, nothing, nothing, None)
    verdict = Verdict(4, 0.4 if S[1] < 0.5 else 0.5, math.nan, 0.0, True)
    assert narrow.hidden(ritz, verdict, 4, 0.1) == pytest.approx(4 * (1 - verdict.edge) if expected else 0.0)


def test_residuals_behind_a_pass_back_are_those_of_the_right_subspace():
    W = trained()
    krylov = Krylov(W, torch.linalg.matrix_norm(W), 1)
    krylov.start(krylov.right_sketch(16))
    while krylov.rank < 64 or not krylov.reached:
        krylov.advance()
    ritz = krylov.right_ritz()
    U, S, Vh = krylov.triplets(ritz, 0, 40)
    scaled = W / torch.linalg.matrix_norm(W)
    torch.testing.assert_close(scaled @ Vh.mT, U * S, rtol=0, atol=1e-12)
    true = torch.linalg.vector_norm(scaled.mT @ U - Vh.mT * S, dim=0)
    torch.testing.assert_close(torch.tensor(ritz.residual[0][:40], dtype=torch.float64), true, rtol=1e-6, atol=1e-12)


def test_only_a_single_large_matrix_of_which_values_are_counted():
    def asked(shape, request):
        W = torch.empty(shape)
        return narrow.stays_narrow(Krylov(W, torch.ones(shape[:-2]), 0), [request])

    assert asked((4000, 2000), Request())
    assert asked((1600, 9000), Request(rank=40))
    assert not asked((4000, 1000), Request())
    assert not asked((2, 2000, 2000), Request())
    assert not asked((2000, 2000), Request(level=0.1))
    assert not asked((2000, 2000), Request(bulk=True))


def test_what_would_take_a_wide_basis_goes_to_the_gram_matrix(served, monkeypatch):
    passes = []
    monkeypatch.setattr(Krylov, "advance", lambda self, *fresh, go=Krylov.advance: (passes.append(1), go(self, *fresh)))
    W = with_spectrum(*SHAPE, 1 - 0.5 * torch.arange(SHAPE[1], dtype=torch.float64) / SHAPE[1])
    found = pss.dominant_directions(W, 30, tol=1e-4)
    assert served == [False]
    assert len(passes) < 16
    assert error_of(W, found) <= float(found.error) <= 1e-4


def test_a_large_matrix_is_served(monkeypatch):
    words = []
    monkeypatch.setattr(solver, "deepen", lambda *asked: words.append(narrow.deepen(*asked)) or words[-1])
    j = torch.arange(1, 1601, dtype=torch.float64)
    W = torch.diag(torch.where(j < 200, 1 + 3 * j**-0.5, 1.2 * (1 - j / 1700))).float()
    found = pss.dominant_directions(W, tol=1e-2)
    assert words[0][1] is not None
    assert int(found.k) > 10
    S = W.diagonal().double()
    ours = (found.U.double() * (found.S - found.edge).double()) @ found.Vh.double()
    exact = torch.diag((S - S[int(found.k)]).clamp_min(0))
    assert float((ours - exact).norm() / S.norm()) <= float(found.error) <= 1e-2
