# SPDX-License-Identifier: Apache-2.0
"""When an iteration looks: the schedule itself, and that looks are few."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pss_param as pss
from pss_param import passes
from pss_param.krylov import Krylov

grows = st.floats(1e-3, 50.0)
tolerances = st.floats(1e-6, 0.5)


@given(st.floats(0.05, 1.0), st.floats(0.01, 1.0))
def test_growth_is_what_two_passes_make_of_a_gap(edge, last):
    """A Chebyshev polynomial of degree two passes, bounded by one up to ``last``: ``cosh(acosh(...))`` at the edge."""
    values = sorted([1.0, edge, min(edge, last)], reverse=True)
    ratio = values[1] / values[2]
    assert math.cosh(passes.growth([values], [1], 3)) == pytest.approx(max(2 * ratio**2 - 1, 1.0), rel=1e-5)


def test_the_least_growth_of_a_batch_counts_and_columns_beyond_a_block_do_not():
    steep, flat = [1.0, 0.5, 0.01, 0.001], [1.0, 0.5, 0.45, 0.001]
    assert passes.growth([steep, flat], [1, 1], 3) == passes.growth([flat], [1], 3)
    assert passes.growth([steep], [1], 4) > passes.growth([steep], [1], 3)


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [1.0]])
def test_growth_of_values_of_nothing_is_finite(values):
    assert 0 < passes.growth([values], [5], 8) < math.inf


@given(grows, tolerances, st.sampled_from([8, 16, 32]))
def test_more_passes_for_less_growth_and_less_tolerance(g, tol, columns):
    many = passes.before_first_look(g, tol, columns, 10**9)
    assert 2 <= many <= 10
    assert passes.before_first_look(g, tol / 2, columns, 10**9) >= many
    if not g < 4 < 1.1 * g:
        assert passes.before_first_look(1.1 * g, tol, columns, 10**9) <= many


def test_a_crowded_edge_is_looked_at_early():
    assert passes.before_first_look(0.3, 1e-4, 16, 1024) == 2 < passes.before_first_look(0.3, 1e-4, 16, 10**5)


def test_a_narrow_block_asks_its_values_only_where_they_decide():
    assert passes.first_look_of_narrow(1e-2) == 2
    assert passes.first_look_of_narrow(1e-3) is None
    assert passes.first_look_of_narrow(1e-5) == 3


@given(grows, st.floats(0.0, 1e9), st.sampled_from([300, 5000]), st.integers(2, 6))
def test_a_leap_is_one_pass_at_least_and_never_long(g, worst, least, blocks):
    assert 1 <= passes.after_first_look(g, worst, least, blocks) <= 8
    assert 1 <= passes.after_later_look(worst, 2 * worst, 3) <= 4


def test_nothing_is_learned_from_a_bound_that_did_not_fall():
    assert passes.after_later_look(5.0, 4.0, 3) == passes.after_later_look(5.0, math.inf, 3) == 1
    assert passes.after_first_look(5.0, math.inf, 9, 2) == 1


def test_a_leap_goes_on_at_the_rate_seen():
    assert passes.after_later_look(math.e**4, math.e**8, 2) == 1
    assert passes.after_later_look(math.e**4, math.e**6, 2) == 2


@pytest.mark.parametrize(("grows", "answer"), [(0.3, True), (4.0, False)])
def test_crowded_edges_are_told_from_their_growth(grows, answer):
    assert passes.crowded(grows, 16, 1024) is answer


@given(st.floats(0.1, 2.0), st.integers(2, 40), st.integers(1, 4))
def test_a_power_law_goes_on_beyond_the_block(exponent, rank, tiles):
    values, columns = [j**-exponent for j in range(1, 65)], 16 * tiles
    seen = passes.growth_beyond([values], [rank], columns)
    # What the wider block will show, as far as 64 columns reach, less the share that is held back.
    true = passes.growth([values], [rank], columns) if columns > rank else 0.0
    assert seen == pytest.approx(0.75 * true, rel=1e-6, abs=2e-3)


def test_the_least_growth_beyond_a_block_counts():
    steep, flat = [0.5**j for j in range(20)], [0.99**j for j in range(20)]
    assert passes.growth_beyond([steep, flat], [10, 10], 32) == passes.growth_beyond([flat], [10], 32)
    assert passes.growth_beyond([steep], [10], 32) > passes.growth_beyond([flat], [10], 32)


@pytest.mark.parametrize("columns", [16, 512])
@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [1.0]])
def test_growth_beyond_values_of_nothing_is_finite(values, columns):
    assert 0 < passes.growth_beyond([values], [5], columns) < math.inf


def test_a_norm_alone_is_not_taken_for_a_crowded_edge(monkeypatch):
    """No value is wanted and no block is too narrow: the iteration goes on until the norm is certain."""
    monkeypatch.setattr("pss_param.solver.dense", None)
    n = 1024
    S = torch.arange(1, n + 1, dtype=torch.float64) ** -0.3
    U, V = (torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(i)).double()).Q for i in (0, 1))
    W = ((U * S) @ V.T).float()
    looks, look = [], Krylov.ritz
    monkeypatch.setattr(Krylov, "ritz", lambda self: looks.append(1) or look(self))
    assert float(pss.spectral_norm(W)) == pytest.approx(1.0, rel=5e-5)
    assert len(looks) > 1  # the first look did not settle it


def test_a_block_that_was_guessed_too_narrow_is_widened_not_given_up(monkeypatch):
    """Seventeen values that fall steadily, of which a sketch of sixteen columns saw too few."""
    monkeypatch.setattr("pss_param.solver.dense", None)  # the Gram matrix would cost four times as much
    n = 1024
    S = torch.exp(-0.03 * torch.arange(1, n + 1, dtype=torch.float64))
    U, V = (torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(i)).double()).Q for i in (0, 1))
    found = pss.dominant_directions(((U * S) @ V.T).float())
    assert int(found.k) == math.floor(float((S / S[0]).square().sum()))
    assert bool(found.converged)


@pytest.mark.parametrize("exponent", [0.5, 0.7, 1.0, 1.5])
@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-4])
def test_looks_are_few(exponent, tol, monkeypatch):
    n = 512
    S = torch.arange(1, n + 1, dtype=torch.float64) ** -exponent
    U, V = (torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(i)).double()).Q for i in (0, 1))
    looks = []
    look = Krylov.ritz
    monkeypatch.setattr(Krylov, "ritz", lambda self: looks.append(self.rank) or look(self))
    found = pss.dominant_directions(((U * S) @ V.T).float(), tol=tol)
    assert bool(found.converged)
    assert len(looks) <= 2
