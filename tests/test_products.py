# SPDX-License-Identifier: Apache-2.0
"""Products of a matrix with a thin block are the products, whatever the layout and however many threads share them."""

from __future__ import annotations

import pytest
import torch

from pss_param import products
from pss_param.products import Panels, ThinProducts

SHAPES = [(300, 200), (200, 300), (257, 129), (64, 500), (3, 2000), (130, 1)]


@pytest.fixture(params=[1, 2, 3, 5])
def threads(request, monkeypatch):
    """As many panels as there would be threads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    monkeypatch.setattr(products, "_MKL", True)
    return request.param


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layouts(W: torch.Tensor) -> dict[str, torch.Tensor]:
    wide = torch.zeros(W.shape[0] + 3, W.shape[1] + 5, dtype=W.dtype)
    wide[2:-1, 4:-1] = W
    return {"rows": W, "columns": W.mT.contiguous().mT, "view": wide[2:-1, 4:-1]}


@pytest.mark.parametrize("layout", ["rows", "columns", "view"])
@pytest.mark.parametrize("columns", [1, 8, 16, 30])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_they_are_the_products(shape, columns, layout, threads):
    W = layouts(gaussian(*shape))[layout]
    X, Y = gaussian(columns, shape[1], seed=1).mT, gaussian(columns, shape[0], seed=2).mT
    torch.testing.assert_close(ThinProducts(W, 0.3).times(X), 0.3 * (W @ X))
    torch.testing.assert_close(ThinProducts(W, 0.3).times_t(Y), 0.3 * (W.mT @ Y))
    torch.testing.assert_close(Panels(W).behind(Y.mT), Y.mT @ W)


@pytest.mark.parametrize("shape", [(4, 300, 200), (4, 130, 257)], ids=str)
def test_batches_with_a_factor_each(shape, threads):
    W, factor = gaussian(*shape), torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64)[:, None, None]
    X, Y = gaussian(4, 8, shape[2], seed=1).mT, gaussian(4, 8, shape[1], seed=2).mT
    torch.testing.assert_close(ThinProducts(W, factor).times(X), factor * (W @ X))
    torch.testing.assert_close(ThinProducts(W, factor).times_t(Y), factor * (W.mT @ Y))


def test_each_thread_has_a_panel_and_no_thread_has_a_narrow_one(threads):
    assert products._how_many(torch.empty(10, 10_000)) == threads
    assert products._how_many(torch.empty(10_000, 100)) == 1
    assert products._how_many(torch.empty(2, 10, 10_000)) == 1


def test_rows_of_a_result_are_contiguous(threads):
    assert Panels(gaussian(300, 257)).behind(gaussian(8, 300)).is_contiguous()
    assert ThinProducts(gaussian(300, 257)).times_t(gaussian(8, 300).mT).mT.is_contiguous()


def test_the_same_bits_each_time(threads):
    W, X = gaussian(500, 700, dtype=torch.float32), gaussian(8, 700, seed=1, dtype=torch.float32).mT
    assert torch.equal(ThinProducts(W).times(X), ThinProducts(W).times(X))
    assert torch.equal(ThinProducts(W.mT).times_t(X), ThinProducts(W.mT).times_t(X))


def test_without_mkl_a_matrix_stays_whole(threads, monkeypatch):
    monkeypatch.setattr(products, "_MKL", False)
    W, X, Y = gaussian(300, 257), gaussian(8, 257, seed=1).mT, gaussian(8, 300, seed=2).mT
    monkeypatch.setattr(torch, "baddbmm", None)
    torch.testing.assert_close(ThinProducts(W).times(X), W @ X)
    torch.testing.assert_close(ThinProducts(W).times_t(Y), W.mT @ Y)
