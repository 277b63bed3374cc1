# SPDX-License-Identifier: Apache-2.0
"""What lies above a level, by the algorithms for a batch on a GPU; the same on a CPU."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from batches import without_the_third
from spectra import gaussian, power, with_spectrum

from pss_param import batch_filter, levels
from pss_param.below import tops_of
from pss_param.certificate import Request
from pss_param.found import Found

TOL = 1e-2
CASES = [(shape, torch.float32) for shape in ((60, 60), (40, 90), (90, 40), (200, 200), (210, 300), (300, 210))]
CASES += [((200, 200), torch.float64)]


@cache
def batch(m: int, n: int) -> torch.Tensor:
    falling = [with_spectrum(m, n, power(min(m, n), exponent), seed=i) for i, exponent in enumerate((0.3, 1.0))]
    return torch.stack([*falling, gaussian(m, n), 1e-20 * gaussian(m, n, seed=1)])


@cache
def exact(m: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Triplets of the matrices over their norms."""
    W = batch(m, n)
    U, S, Vh = torch.linalg.svd(W / torch.linalg.matrix_norm(W)[:, None, None], full_matrices=False)
    return U, S, Vh


def asked(W: torch.Tensor, over: float, tol: float) -> tuple[torch.Tensor, list[Request]]:
    norms = torch.linalg.matrix_norm(W.double())
    tops = torch.linalg.matrix_norm(W.double(), 2) / norms
    return norms, [Request(level=over * float(top), tol=tol) for top in tops]


def error_of(shape: tuple[int, int], index: int, found: Found, level: float) -> float:
    """Of the clipped matrix, over its norm."""
    U, S, Vh = (part[index] for part in exact(*shape))
    ours = (found.U.double() * (found.S.double() - level).clamp_min(0)) @ found.Vh.double()
    return float(((U * (S - level).clamp_min(0)) @ Vh - ours).norm())


@pytest.mark.parametrize("tol", [1e-2, 1e-3])
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("over", [0.5, 0.9, 0.97, 1.005])
def test_whatever_is_found_is_within_the_tolerance(
    shape: tuple[int, int], dtype: torch.dtype, over: float, tol: float
) -> None:
    W, values = batch(*shape).to(dtype), exact(*shape)[1]
    norms, requests = asked(W, over, tol)
    found = levels.above_levels([W], norms, requests, [0, 1, 2, 3], seed=0)
    for i, one in found.items():
        assert error_of(shape, i, one, requests[i].level) <= one.verdict.error <= tol
        assert one.verdict.k == one.S.numel() <= int((values[i] > requests[i].level * (1 - 1e-6)).sum())
        assert one.top == pytest.approx(float(values[i, 0]), rel=1e-4)
        assert 0 <= one.verdict.edge <= values[i, one.verdict.k] * (1 + 1e-6)  # what is below was damped
    if over > 1:
        assert found.keys() == {0, 1, 2, 3}
        assert all(one.verdict.k == 0 for one in found.values())
    if min(shape) >= 192 and over >= 0.9:
        assert found.keys() == {0, 1, 2, 3}, "the filter is for these"


def test_what_is_too_much_for_a_block_is_left_to_the_whole_spectrum() -> None:
    W = gaussian(240, 240)[None]
    norms, requests = asked(W, 0.3, TOL)
    assert levels.above_levels([W], norms, requests, [0], seed=0) == {}


def test_a_block_that_missed_something_has_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    W = with_spectrum(220, 220, power(220, 0.5))[None]
    norms, requests = asked(W, 0.4, 1e-3)
    assert levels.above_levels([W], norms, requests, [0], seed=0)[0].verdict.k == 6
    monkeypatch.setattr(levels, "ritz", without_the_third(levels.ritz))
    assert levels.above_levels([W], norms, requests, [0], seed=0) == {}


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-22, 1e15, 1e22, 1e34])
@pytest.mark.parametrize("shape", [(200, 200), (200, 300), (300, 200)], ids=str)
def test_triplets_at_any_scale_of_float32(shape: tuple[int, int], scale: float) -> None:
    values = torch.cat([torch.tensor([10.0, 8.0]), torch.linspace(1, 0.1, 198)]).double()
    exactly = with_spectrum(*shape, values).double()
    W = (scale * exactly).float()[None]
    norms = torch.linalg.matrix_norm(W.double())
    found = levels.above_levels([W], norms, [Request(level=5 * scale / float(norms), tol=1e-3)], [0], seed=0)[0]
    assert found.verdict.k == 2
    assert torch.allclose(found.S.double() * norms / scale, values[:2], rtol=1e-4)
    for side in (found.U.mT, found.Vh):
        assert torch.allclose(side @ side.mT, torch.eye(2), atol=1e-4)


@pytest.mark.parametrize("level", [1e-13, 1e-77, 1e-165, 5e-324])
def test_levels_whose_squares_are_nothing_are_left_to_the_whole_spectrum(level: float) -> None:
    W = gaussian(200, 200)[None]
    assert (
        levels.above_levels([W], torch.linalg.matrix_norm(W.double()), [Request(level=level, tol=1e-3)], [0], 0) == {}
    )


@pytest.mark.parametrize("rank", [1, 5, 40])
def test_rows_that_no_cholesky_factor_tells_apart_are_made_orthonormal_all_the_same(rank: int) -> None:
    values = torch.cat([torch.linspace(2.0, 1.1, rank), torch.zeros(240 - rank)]).double()
    W = with_spectrum(240, 240, values)[None]
    norms = torch.linalg.matrix_norm(W)
    found = levels.above_levels([W], norms, [Request(level=1 / float(norms), tol=1e-3)], [0], seed=0)[0]
    assert found.verdict.k == rank
    assert torch.allclose(found.S.double() * norms, values[:rank], rtol=1e-5)
    assert torch.allclose(found.Vh @ found.Vh.mT, torch.eye(rank, dtype=found.Vh.dtype), atol=1e-5)


@pytest.mark.parametrize("ratio", [1.5, 30.0, 1e4])
def test_directions_far_above_the_level_hide_none_beside_it(ratio: float) -> None:
    values = torch.cat([torch.tensor([ratio, ratio / 2, 1.2, 1.1]), torch.linspace(0.8, 0.1, 236)]).double()
    W = with_spectrum(240, 240, values)[None]
    norms = torch.linalg.matrix_norm(W)
    tol = max(1e-4, 0.02 / float(norms))
    found = levels.above_levels([W], norms, [Request(level=1 / float(norms), tol=tol)], [0], seed=0)
    assert found[0].verdict.k == int((values > 1).sum())


def test_only_levels_are_asked_about_and_only_those_matrices_that_are_named() -> None:
    W = batch(50, 50)
    norms, high = torch.linalg.matrix_norm(W), Request(level=0.999, tol=TOL)
    some = [Request(tol=TOL), Request(bulk=True, tol=TOL), high, high]
    assert levels.above_levels([W], norms, some, [0, 1, 3], seed=0).keys() == {3}
    assert levels.above_levels([W], norms, [Request(level=0.999, tol=1e-6)] * 4, [0, 1, 2, 3], seed=0) == {}


def test_large_batches_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    W = batch(200, 220)
    norms, requests = asked(W, 0.9, TOL)
    whole = levels.above_levels([W], norms, requests, [0, 1, 2, 3], seed=0)
    monkeypatch.setattr(batch_filter, "_MOST_ELEMENTS", 1000)
    pieces = levels.above_levels([W], norms, requests, [0, 1, 2, 3], seed=0)
    assert whole.keys() == pieces.keys() == {0, 1, 2, 3}
    for i in whole:
        assert whole[i].verdict.k == pieces[i].verdict.k
        assert whole[i].top == pytest.approx(pieces[i].top, rel=1e-12)


def test_the_zero_matrix_has_nothing_above_any_level() -> None:
    one = torch.ones(1, dtype=torch.float64)
    found = levels.above_levels([torch.zeros(1, 8, 8)], one, [Request(level=0.1, tol=TOL)], [0], seed=0)
    assert found[0].top == 0


def test_tops_come_from_below() -> None:
    W = batch(90, 80)[:3]
    G = W.mT @ W
    true = torch.linalg.matrix_norm(W, 2)
    assert (tops_of(G) <= true * (1 + 1e-12)).all()
    torch.testing.assert_close(tops_of(G), true, rtol=1e-4, atol=0)
