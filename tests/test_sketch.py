# SPDX-License-Identifier: Apache-2.0
"""The first block: how wide, from what, and that what is shared stays as it is."""

from __future__ import annotations

import math

import pytest
import torch

import pss_param as pss
from pss_param.certificate import OVERSAMPLING, Request
from pss_param.krylov import Krylov, _drawn
from pss_param.sketch import _guess, first_block, is_stale, starts_left, tiles
from pss_param.spectrum import frobenius_norm


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_values(S, m=300, n=400):
    left, right = (torch.linalg.qr(gaussian(rows, len(S), seed=rows)).Q for rows in (m, n))
    return (left * S) @ right.T


def guesses(S, columns, draws=200):
    """What sketches of a matrix with these singular values say: its singular vectors do not matter."""
    S = S / torch.linalg.vector_norm(S)
    for seed in range(draws):
        Z = S[:, None] * gaussian(len(S), columns, seed=seed)
        yield _guess(Z.T @ Z)


POWERS = {exponent: torch.arange(1.0, 257, dtype=torch.float64) ** -exponent for exponent in (0.5, 0.7, 1.0, 2.0)}


@pytest.mark.parametrize("exponent", POWERS)
def test_a_guess_is_right_within_a_factor_of_two(exponent):
    S = POWERS[exponent]
    true = float((S / S[0]).square().sum())
    right = [true / 2 - 1 <= guess <= 2 * true + 1 for guess in guesses(S, 16)]
    assert sum(right) >= 0.95 * len(right)


def test_a_single_direction_is_told_by_eight_columns_almost_for_certain():
    S = torch.cat([torch.tensor([40.0]), torch.full((255,), 1.0)]).double()
    wide = [guess + OVERSAMPLING > 8 for guess in guesses(S, 8)]
    assert sum(wide) <= 0.02 * len(wide)


def test_the_largest_guess_of_a_batch_counts():
    squares = [Z.T @ Z for Z in (gaussian(300, 16, seed=1) / 300**0.5, gaussian(300, 1) @ gaussian(1, 16, seed=2))]
    assert _guess(torch.stack(squares)) == max(map(_guess, squares))


def test_a_matrix_of_zeros_asks_for_no_wide_block():
    assert _guess(torch.zeros(8, 8, dtype=torch.float64)) + OVERSAMPLING <= 16
    assert int(pss.dominant_directions(torch.zeros(600, 700)).k) == 0


@pytest.mark.parametrize(("exponent", "columns"), [(2.0, 8), (0.5, 16)])
def test_the_first_block_is_as_wide_as_the_stable_rank_asks_for(exponent, columns):
    W = with_values(POWERS[exponent]).float()
    block, squares, _ = first_block(Krylov(W, frobenius_norm(W[None])[0], 0), [Request()], None)
    assert block.shape == (300, columns)  # of the smaller side
    assert torch.allclose(squares, block.double().T @ block.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(300, 400), (400, 300)], ids=str)
def test_a_first_block_that_is_widened_is_as_good_as_one_that_was_wide(shape, dtype):
    W = with_values(POWERS[0.7], *shape).to(dtype)
    wide, widened = (Krylov(W, torch.linalg.matrix_norm(W), 0) for _ in range(2))
    sketch = wide.right_sketch(16)
    wide.start(sketch)
    widened.start(sketch[:, :8])
    widened.widen(sketch[:, 8:])
    for _ in range(4):
        assert widened.random_columns == wide.random_columns == 16
        assert widened.core.widths == wide.core.widths
        one, other = wide.ritz(), widened.ritz()
        assert other.S[0][:8] == pytest.approx(one.S[0][:8], rel=1e-4)
        assert other.residual[0][:8] == pytest.approx(one.residual[0][:8], rel=0.05, abs=1e-5)
        torch.testing.assert_close(widened.basis.mT @ widened.basis, torch.eye(widened.rank, dtype=dtype))
        wide.advance()
        widened.advance()


def test_widening_keeps_the_sketch_where_all_of_it_lies_along_the_first_block(monkeypatch):
    """A cluster of which both halves are made: what they have in common is taken out, not taken for rounding."""
    S = torch.cat([torch.full((5,), 2.0), torch.full((295,), 1e-2)]).double()
    W = with_values(S)
    krylov = Krylov(W, torch.linalg.matrix_norm(W), 0)
    sketch = krylov.right_sketch(16)
    krylov.start(sketch[:, :8])
    monkeypatch.setattr(Krylov, "_gaussian", None)  # what takes the place of columns that are lost
    krylov.widen(sketch[:, 8:])
    basis = krylov.basis
    torch.testing.assert_close(basis @ (basis.mT @ sketch), sketch)


@pytest.mark.parametrize(("values", "widened"), [([2.0] * 5, True), ([2.0, 0.9], False)])
def test_a_cluster_that_the_sketch_took_for_one_value_widens_the_first_block(values, widened, monkeypatch):
    asked = []
    monkeypatch.setattr(Krylov, "widen", lambda self, right, widen=Krylov.widen: asked.append(1) or widen(self, right))
    S = torch.cat([torch.tensor(values, dtype=torch.float64), torch.full((600 - len(values),), 1e-2).double()])
    found = pss.dominant_directions(with_values(S, 600, 700).float())
    assert int(found.k) == math.floor(float((S / S[0]).square().sum()))
    assert bool(found.converged)
    assert bool(asked) is widened


def test_known_directions_go_first_and_random_ones_fill_a_tile():
    W = with_values(POWERS[1.0]).float()
    known = torch.linalg.qr(gaussian(400, 5)).Q.float()
    block, squares, _ = first_block(Krylov(W, frobenius_norm(W[None])[0], 0), [Request()], known)
    assert block.shape[1] == tiles(5 + OVERSAMPLING) == 16
    assert torch.equal(block[:, :5], known)
    assert squares is None
    assert starts_left([Request()], known)
    assert not starts_left([Request()], None)


def moved(W, share):
    return W + share * W.norm() * gaussian(*W.shape, seed=9) / math.sqrt(W.numel())


@pytest.mark.parametrize("shape", [(300, 400), (400, 300)], ids=str)
@pytest.mark.parametrize("share", [0.1, 1e-2, 1e-3])
def test_the_drift_is_what_a_matrix_moves_out_of_a_span(shape, share):
    W = with_values(torch.cat([torch.full((40,), 1.0), torch.linspace(0.5, 0.1, 200)]).double(), *shape)
    known, W = torch.linalg.svd(W).Vh[:40].mT, moved(W, share)
    image = W.mT @ (W @ known)
    values = torch.linalg.vector_norm(W @ known, dim=0)
    exact = torch.linalg.matrix_norm((image - known @ (known.mT @ image)) / values) / W.norm()
    assert Krylov(W, W.norm(), 0).drift(known) == pytest.approx(float(exact), rel=0.2)


@pytest.mark.parametrize(("share", "known", "request_", "stale"), [
    (0.1, 40, Request(), True),
    (0.0, 40, Request(), False),
    (0.1, 10, Request(), False),
    (0.1, 40, Request(level=0.1), False),
    (0.1, 40, Request(tol=0.5), False),
], ids=["moved", "the same", "few", "above a level", "hardly asked for more"])  # fmt: skip
def test_what_is_known_is_stale_once_it_costs_more_than_a_sketch(share, known, request_, stale):
    W = with_values(torch.cat([torch.full((40,), 1.0), torch.linspace(0.5, 0.1, 200)]).double())
    init, W = torch.linalg.svd(W).Vh[:known].mT, moved(W, share)
    assert is_stale(Krylov(W, W.norm(), 0), [request_], init) is stale


@pytest.mark.parametrize("change", ["none", "longer", "mixed"])
def test_the_drift_is_that_of_a_span(change):
    W = with_values(torch.cat([torch.full((40,), 1.0), torch.linspace(0.5, 0.1, 200)]).double())
    known = torch.linalg.svd(W).Vh[:40].mT
    other = {"none": known, "longer": 1e3 * known, "mixed": known @ gaussian(40, 40, seed=3)}[change]
    assert Krylov(W, W.norm(), 0).drift(other) < 1e-9


@pytest.mark.parametrize("shape", [(300, 330), (600, 700)], ids=str)
def test_a_stale_start_is_a_cold_one(shape):
    rest = torch.linspace(0.1, 0.01, min(shape) - 30)
    W = with_values(torch.cat([torch.full((20,), 1.0), rest]).double(), *shape)
    known, W = torch.linalg.svd(W).Vh[:22].mT, moved(W, 0.1)
    cold, warm = (pss.dominant_directions(W, 20, tol=1e-4, init=init) for init in (None, known))
    assert torch.equal(cold.U, warm.U)
    assert bool(cold.converged)
    again = pss.dominant_directions(W, 20, tol=1e-4, init=cold.Vh.mT)
    assert not torch.equal(cold.U, again.U)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_basis_that_is_exhausted_leaves_the_random_columns_that_all_share_as_they_were(rank, monkeypatch):
    drawn = []
    monkeypatch.setattr("pss_param.krylov._drawn", lambda *key: drawn.append((key, _drawn(*key))) or drawn[-1][1])
    W = with_values(torch.ones(rank, dtype=torch.float64)).float()
    krylov = Krylov(W, frobenius_norm(W[None])[0], seed=5)
    krylov.start(krylov.right_sketch(16))
    while len(krylov.core.widths) < 4:
        krylov.advance()
    assert math.isfinite(krylov.ritz().S[0][0])
    assert sum(shared.numel() > 0 for _, shared in drawn) > 1  # lost directions gave way to random ones
    assert all(torch.equal(shared, _drawn.__wrapped__(*key)) for key, shared in drawn)
