# SPDX-License-Identifier: Apache-2.0
"""Matrices that may stay as they are are told from those that may not; the same on a CPU as on the GPU it is for."""

from __future__ import annotations

import pytest
import torch
from spectra import gaussian, power, with_spectrum

from pss_param.below import nothing_above
from pss_param.certificate import Request

SHAPES = [(60, 60), (40, 90), (90, 40)]
TOL = 1e-2


def batch(m: int, n: int) -> torch.Tensor:
    falling = [with_spectrum(m, n, power(min(m, n), exponent), seed=i) for i, exponent in enumerate((0.3, 1.0))]
    return torch.stack([*falling, gaussian(m, n), 1e-20 * gaussian(m, n, seed=1)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("over", [0.5, 0.97, 0.995, 1.005, 1.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_left_alone_loses_less_than_the_tolerance(
    shape: tuple[int, int], over: float, dtype: torch.dtype
) -> None:
    exact = batch(*shape)
    W = (exact * 1e15 if dtype == torch.float64 else exact).to(dtype)
    norms = torch.linalg.matrix_norm(W.double())
    values = torch.linalg.svdvals(W.double()) / norms[:, None]
    requests = [Request(level=over * float(top), tol=TOL) for top in values[:, 0]]
    found = nothing_above(W, norms, requests, [0, 1, 2, 3])
    for i, request in enumerate(requests):
        taken = float((values[i] - request.level).clamp_min(0).norm())
        if i in found:
            assert taken <= found[i].verdict.error == TOL
            assert found[i].verdict.k == 0
            assert found[i].top == pytest.approx(float(values[i, 0]), rel=1e-4)
            assert found[i].top <= float(values[i, 0]) * (1 + 1e-6)
        else:
            assert values[i, 0] > request.level * (1 + TOL - 2e-5)
    assert (len(found) == 4) == (over > 0.991)


def test_only_levels_are_asked_about_and_only_those_matrices_that_are_named() -> None:
    W = batch(50, 50)
    norms = torch.linalg.matrix_norm(W)
    high = Request(level=0.999, tol=TOL)
    assert nothing_above(W, norms, [Request(tol=TOL), Request(bulk=True, tol=TOL), high, high], [0, 1, 3]).keys() == {3}
    assert nothing_above(W, norms, [Request(level=0.999, tol=1e-6)] * 4, [0, 1, 2, 3]) == {}


def test_large_batches_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    W = batch(30, 30)
    norms = torch.linalg.matrix_norm(W)
    requests = [Request(level=0.999, tol=TOL)] * 4
    whole = nothing_above(W, norms, requests, [0, 1, 2, 3])
    monkeypatch.setattr("pss_param.below._MOST_ELEMENTS", 1000)
    pieces = nothing_above(W, norms, requests, [0, 1, 2, 3])
    assert whole.keys() == pieces.keys() == {0, 1, 2, 3}
    assert all(whole[i].top == pytest.approx(pieces[i].top, rel=1e-12) for i in whole)


def test_the_zero_matrix_has_nothing_above_any_level() -> None:
    W = torch.zeros(1, 8, 8)
    found = nothing_above(W, torch.ones(1, dtype=torch.float64), [Request(level=0.1, tol=TOL)], [0])
    assert found[0].top == 0
