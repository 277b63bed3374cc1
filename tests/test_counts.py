# SPDX-License-Identifier: Apache-2.0
"""Dominant values of many matrices at once, by the algorithm for a GPU; the same on a CPU."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from batches import without_the_third
from spectra import gaussian, power, with_spectrum

from pss_param import batch_filter, below, counts
from pss_param.certificate import Request
from pss_param.found import Found

SHAPES = [(200, 200), (210, 300), (300, 210)]
J = torch.arange(1, 301, dtype=torch.float64)
SPECTRA = {
    "j^-0.3": J**-0.3,
    "j^-0.5": J**-0.5,
    "1/j": 1 / J,
    "1/j^3": J**-3.0,
    "exponential": torch.exp(-J / 12),
    "plateaus": torch.where(J < 9, 1.0, torch.where(J < 30, 0.8, 0.1)),
    "cluster at the edge": torch.where(J < 2, 1.0, torch.where(J < 40, 0.6, 0.2)),
    "four above a bulk": torch.where(J < 5, 5 - J / 10, 1 - J / 400),
    "low rank": torch.where(J < 7, 1 / J, 0.0),
    "graded": 10 ** (-J / 10),
}


@cache
def made(name: str, shape: tuple[int, int]) -> torch.Tensor:
    return with_spectrum(*shape, SPECTRA[name], seed=len(name)).float()


@cache
def exact(name: str, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Triplets over the norm, of what float32 has made of it."""
    W = made(name, shape).double()
    U, S, Vh = torch.linalg.svd(W / W.norm(), full_matrices=False)
    return U, S, Vh


def clipped(U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor, k: int, edge: float) -> torch.Tensor:
    """What a clip takes away."""
    taken = (part.double() for part in (U[:, :k], (S[:k] - edge).clamp_min(0), Vh[:k]))
    left, fall, right = taken
    return (left * fall) @ right


def error_of(found: Found, name: str, shape: tuple[int, int]) -> float:
    U, S, Vh = exact(name, shape)
    k = found.verdict.k
    return float(
        (clipped(U, S, Vh, k, float(S[k])) - clipped(found.U, found.S, found.Vh, k, found.verdict.edge)).norm()
    )


def norms_of(*groups: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.linalg.matrix_norm(group.double()) for group in groups])


@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_whatever_is_found_is_within_the_tolerance(name: str, shape: tuple[int, int], tol: float) -> None:
    W = made(name, shape)[None]
    found = counts.leading([W], norms_of(W), [Request(tol=tol)], [0], seed=0)
    top = float(exact(name, shape)[1][0])
    if tol > 1e-4 or name in {"1/j", "1/j^3", "exponential", "plateaus"}:
        assert 0 in found, "the filter is for these"
    for one in found.values():
        assert one.verdict.k == math.floor(1 / top**2 * (1 + 1e-4))
        assert error_of(one, name, shape) <= one.verdict.error <= tol
        assert one.top == pytest.approx(top, rel=1e-6)
        for side in (one.U.mT, one.Vh):
            assert torch.allclose(side @ side.mT, torch.eye(one.verdict.k), atol=2e-3)


def test_shapes_widths_and_ranks_of_all_kinds_at_once() -> None:
    names = list(SPECTRA)
    groups = [torch.stack([made(name, shape) for name in names]) for shape in ((200, 300), (300, 200), (200, 200))]
    ranks = [None, 3, 17, 1, None]
    requests = [Request(ranks[i % 5], tol=1e-2) for i in range(3 * len(names))]
    found = counts.leading(groups, norms_of(*groups), requests, list(range(len(requests))), seed=0)
    assert len(found) > 0.8 * len(requests)
    for i, one in found.items():
        name, shape = names[i % len(names)], tuple(groups[i // len(names)].shape[1:])
        assert (one.U.shape[0], one.Vh.shape[1]) == shape
        assert requests[i].rank in {None, one.verdict.k}
        assert error_of(one, name, shape) <= one.verdict.error <= 1e-2


def test_only_counts_are_asked_about_and_only_those_matrices_that_are_named() -> None:
    W = made("1/j", (200, 200)).expand(4, -1, -1)
    requests = [Request(level=0.5), Request(bulk=True), Request(rank=0), Request()]
    assert counts.leading([W], norms_of(W), requests, [0, 1, 2, 3], seed=0).keys() == {3}
    assert counts.leading([W], norms_of(W), [Request()] * 4, [1, 2], seed=0).keys() == {1, 2}


def test_small_matrices_and_flat_ones_are_left_to_the_whole_spectrum() -> None:
    for W in (made("1/j", (200, 200))[None, :64, :64], with_spectrum(200, 200, torch.ones(200))[None]):
        assert counts.leading([W], norms_of(W), [Request()], [0], seed=0) == {}


def test_matrices_of_zeros_are_left_to_the_whole_spectrum_and_disturb_no_other() -> None:
    W = torch.stack([torch.zeros(200, 210), made("1/j", (300, 210))[:200], torch.zeros(200, 210)])
    norms = norms_of(W).masked_fill(norms_of(W) == 0, 1.0)
    requests = [Request(), Request(), Request(rank=3)]
    found = counts.leading([W], norms, requests, [0, 1, 2], seed=0)
    assert found.keys() == {1}
    alone = counts.leading([W[1:2]], norms[1:2], [Request()], [0], seed=0)[0]
    torch.testing.assert_close(found[1].S, alone.S, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 7])
def test_what_lies_in_the_rounding_of_squares_is_left_to_the_whole_spectrum(rank: int, dtype: torch.dtype) -> None:
    unit = torch.zeros(256, 256, dtype=dtype)
    unit[0, 0] = 1.0
    for W in (unit, torch.outer(*gaussian(2, 256)).to(dtype)):
        found = counts.leading([W[None]], norms_of(W[None]), [Request(rank)], [0], seed=0)
        assert found == {}
    steep = with_spectrum(256, 256, 10.0 ** (-torch.arange(256.0).double() / 2)).to(dtype)[None]
    for one in counts.leading([steep], norms_of(steep), [Request(rank)], [0], seed=0).values():
        assert torch.allclose(one.U.mT @ one.U, torch.eye(rank, dtype=dtype), atol=1e-3)


def test_rows_of_large_matrices_are_squared_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for W in (gaussian(300, 20)[None].float(), gaussian(20, 300)[None].float(), gaussian(60, 50).reshape(3, 20, 50)):
        whole = below.gram_of(W, norms_of(W))
        with monkeypatch.context() as patch:
            patch.setattr(below, "_MOST_ELEMENTS", 300)
            torch.testing.assert_close(below.gram_of(W, norms_of(W)), whole, rtol=1e-12, atol=1e-14)
        assert whole.diagonal(dim1=-2, dim2=-1).sum(-1).tolist() == pytest.approx([1.0] * len(W))


def test_values_of_zero_have_residuals_that_are_numbers() -> None:
    G = torch.zeros(1, 4, 4, dtype=torch.float64)
    G[0, 0, 0] = 1.0
    found = batch_filter.ritz(G, torch.eye(4, dtype=torch.float64)[None, :3])
    assert (found.S, found.residual) == ([[1.0, 0.0, 0.0]], [[0.0, 0.0, 0.0]])


def test_a_block_that_missed_something_has_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    W = with_spectrum(220, 220, power(220, 0.5))[None]
    assert counts.leading([W], norms_of(W), [Request()], [0], seed=0)[0].verdict.k == 5
    monkeypatch.setattr(counts, "ritz", without_the_third(counts.ritz))
    assert counts.leading([W], norms_of(W), [Request()], [0], seed=0) == {}


def test_large_batches_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [made("exponential", shape).expand(2, -1, -1) for shape in ((200, 220), (300, 200))]
    requests = [Request()] * 4
    whole = counts.leading(groups, norms_of(*groups), requests, [0, 1, 2, 3], seed=0)
    monkeypatch.setattr(batch_filter, "_MOST_ELEMENTS", 100_000)
    pieces = counts.leading(groups, norms_of(*groups), requests, [0, 1, 2, 3], seed=0)
    assert whole.keys() == pieces.keys() == {0, 1, 2, 3}
    for i in whole:
        assert whole[i].verdict.k == pieces[i].verdict.k
        torch.testing.assert_close(whole[i].S, pieces[i].S, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-37, 1e-22, 1e22, 1e34])
def test_any_scale_of_float32(scale: float) -> None:
    W = (scale * with_spectrum(200, 230, power(200, 1.0))).float()[None]
    found = counts.leading([W], norms_of(W), [Request(rank=6)], [0], seed=0)[0]
    torch.testing.assert_close(found.S.double() * norms_of(W) / scale, power(6, 1.0), rtol=1e-5, atol=0)


def test_float64_keeps_its_digits() -> None:
    W = with_spectrum(230, 200, power(200, 1.0))[None]
    found = counts.leading([W], norms_of(W), [Request(rank=6, tol=1e-9)], [0], seed=0)[0]
    torch.testing.assert_close(found.S * norms_of(W), power(6, 1.0), rtol=1e-12, atol=0)


def test_gaussian_matrices_with_spikes() -> None:
    W = torch.stack([gaussian(256, 256, seed) + 3 * torch.outer(*gaussian(2, 256, seed + 9)) for seed in range(4)])
    found = counts.leading([W.float()], norms_of(W), [Request(tol=1e-2)] * 4, [0, 1, 2, 3], seed=0)
    assert {one.verdict.k for one in found.values()} == {1}
    for i, one in found.items():
        assert one.top * float(norms_of(W)[i]) == pytest.approx(float(torch.linalg.matrix_norm(W[i], 2)), rel=1e-5)
