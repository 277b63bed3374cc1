# SPDX-License-Identifier: Apache-2.0
"""The filtered Gram matrix: its certificate holds against float64, and it refuses to certify what was missed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import exact_clip, gaussian, with_spectrum

from pss_param.certificate import Request
from pss_param.definite import positive_definite
from pss_param.filtered import dominant_by_filter
from pss_param.whole import dense


def crowded(n: int, exponent: float, height: float, wide: float) -> torch.Tensor:
    """Values that fall slowly from ``height`` onto a flat bulk, as in a trained weight."""
    j = torch.arange(1, n + 1, dtype=torch.float64)
    return torch.where(j < wide * n, 1 + height * j**-exponent, 0.9 - 0.8 * j / n)


def filtered(W: torch.Tensor, request: Request, start: torch.Tensor):
    scale = torch.linalg.matrix_norm(W).double()
    return dominant_by_filter(W, W.mT @ W / scale.to(W.dtype) ** 2, scale, request, start.to(W.dtype))


def error_of(W: torch.Tensor, found) -> float:
    scale = torch.linalg.matrix_norm(W.double())
    d = (found.S.double() - found.verdict.edge).clamp_min(0) * scale
    smoothed = W.double() - (found.U.double() * d) @ found.Vh.double()
    return float((smoothed - exact_clip(W, k=found.verdict.k)).norm() / scale)


@given(
    shape=st.sampled_from([(200, 200), (260, 230), (150, 400)]),
    exponent=st.floats(0.2, 1.5),
    height=st.floats(0.5, 20),
    wide=st.floats(0.02, 0.3),
    tol=st.sampled_from([1e-2, 1e-3, 1e-4]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_the_bound_holds_for_crowded_values(shape, exponent, height, wide, tol, seed):
    W = with_spectrum(*shape, crowded(min(shape), exponent, height, wide), seed).float()
    found = dense(W, torch.linalg.matrix_norm(W).double(), Request(tol=tol), seed)
    S = torch.linalg.svdvals(W.double())
    assert found.verdict.k == math.floor(float((S / S[0]).square().sum()) * (1 + 1e-4))
    assert found.verdict.error <= tol
    assert error_of(W, found) <= found.verdict.error


@pytest.mark.parametrize("missed", [0, 3, 9])
def test_a_start_that_is_blind_to_a_direction_is_never_certified(missed):
    S = crowded(240, 0.5, 3.0, 0.2)
    W = with_spectrum(240, 240, S)
    V = torch.linalg.svd(W).Vh[missed]
    blind = gaussian(240, 40)
    found = filtered(W, Request(rank=10, tol=1e-3), blind - torch.outer(V, V @ blind))
    assert found is None or error_of(W, found) <= found.verdict.error  # rounding may bring the direction back


@pytest.mark.parametrize("k", [5, 12])
def test_values_close_to_the_edge_do_not_spoil_the_bound(k):
    j = torch.arange(220, dtype=torch.float64)
    for gap in (0.0, 1e-7, 1e-4, 1e-2):
        S = torch.where(j < k, 2.0 - 0.05 * j, 1.0 - gap * (j - k) - 1e-3 * (j > 2 * k) * j)
        W = with_spectrum(220, 220, S).float()
        found = filtered(W, Request(rank=k, tol=1e-3), gaussian(220, 30))
        assert found is None or error_of(W, found) <= found.verdict.error


def trained(n: int, least: int) -> torch.Tensor:
    """Values that crowd around the edge, over a flat bulk."""
    return with_spectrum(n, n, crowded(n, 0.5, 3.0, 1 / least), 1).float()


@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-4])
def test_the_proof_is_not_tried_in_vain_where_it_costs_the_most(tol, monkeypatch):
    tried = []
    monkeypatch.setattr("pss_param.filtered.positive_definite", lambda A: tried.append(len(A)) or positive_definite(A))
    W = trained(520, 8)
    found = dense(W, torch.linalg.matrix_norm(W).double(), Request(tol=tol), 1)
    assert found.verdict.error <= tol
    assert tried == [520]


def test_the_last_round_tries_whatever_is_to_come(monkeypatch):
    monkeypatch.setattr("pss_param.filtered._to_come", lambda *seen: 1.0)
    W = trained(520, 8)
    found = filtered(W, Request(tol=1e-2), gaussian(520, 80))
    assert found is not None
    assert error_of(W, found) <= found.verdict.error


@pytest.mark.parametrize("height", [3.0, 10.0, 30.0])
def test_values_beside_ones_that_are_far_larger_do_not_drown_in_their_rounding(height):
    """A polynomial that grows by more than float32 has digits would make all columns of the bulk alike."""
    j = torch.arange(400, dtype=torch.float64)
    W = with_spectrum(400, 400, torch.where(j < 5, height, 1 - 0.9 * j / 400), 2).float()
    found = filtered(W, Request(rank=8, tol=1e-4), gaussian(400, 24))
    assert found is not None
    assert error_of(W, found) <= found.verdict.error <= 1e-4


def test_many_wanted_values_are_left_to_the_whole_spectrum():
    assert filtered(gaussian(200, 200).float(), Request(), gaussian(200, 32)) is None


@pytest.mark.parametrize(
    ("fall", "shape", "rank"), [(2.97, (500, 300), 2), (1.67, (500, 300), 1), (8.0, (200, 200), 5)]
)
def test_values_that_fall_to_nothing_overflow_nowhere(fall, shape, rank):
    W = with_spectrum(*shape, 10.0 ** (-torch.arange(min(shape)).double() / fall), 3).float()
    found = dense(W, torch.linalg.matrix_norm(W).double(), Request(rank=rank, tol=1e-5), 1)
    assert found.verdict.k == rank
    assert error_of(W, found) <= found.verdict.error
    start = gaussian(min(shape), 40)
    narrow = filtered(W, Request(rank=rank, tol=1e-5), start)
    assert narrow is None or error_of(W, narrow) <= narrow.verdict.error
