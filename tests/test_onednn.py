# SPDX-License-Identifier: Apache-2.0
"""oneDNN's products are the products, to float32's rounding, and serve only where they are sure to be fast."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch

import pss_param as pss
from pss_param import onednn
from pss_param.definite import positive_definite
from pss_param.products import Panels, ThinProducts
from pss_param.whole import _gram

EPS = torch.finfo(torch.float32).eps
avx512 = pytest.mark.skipif(onednn._linear() is None, reason="no oneDNN, or no 512-bit registers")


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_gaps(W: torch.Tensor) -> torch.Tensor:
    wide = torch.zeros(W.shape[0], W.shape[1] + 16)
    wide[:, : W.shape[1]] = W
    return wide[:, : W.shape[1]]


LAYOUTS = {"rows": lambda W: W, "columns": lambda W: W.mT.contiguous().mT, "gaps": with_gaps}


class Call(NamedTuple):
    """What oneDNN was asked for."""

    shape: tuple[int, ...]
    precision: str


@pytest.fixture
def asked(monkeypatch):
    """Calls of oneDNN."""
    calls, linear = [], onednn._linear()

    def counted(X, W, *rest):
        setting = getattr(torch.backends.mkldnn, "matmul", None)
        calls.append(Call(tuple(W.shape), getattr(setting, "fp32_precision", "ieee")))
        return linear(X, W, *rest)

    monkeypatch.setattr(onednn, "_linear", lambda: counted)
    return calls


@pytest.fixture
def fresh():
    """What is known of the machine is found out anew, and again behind the test."""
    onednn._linear.cache_clear()
    yield
    onednn._linear.cache_clear()


@avx512
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("columns", [8, 16, 33])
@pytest.mark.parametrize("shape", [(900, 1100), (1301, 701), (300, 4000)], ids=str)
def test_thin_products_agree_with_float64(shape, columns, layout, asked):
    W = LAYOUTS[layout](gaussian(*shape))
    X, Y = gaussian(columns, shape[1], seed=1).mT, gaussian(columns, shape[0], seed=2).mT
    for found, exact in (
        (ThinProducts(W, 0.3).times(X), 0.3 * (W.double() @ X.double())),
        (ThinProducts(W, 0.3).times_t(Y), 0.3 * (W.mT.double() @ Y.double())),
        (Panels(W).behind(Y.mT), Y.mT.double() @ W.double()),
    ):
        # A small part of what the certificate counts as rounding: the terms have random signs.
        most = EPS * 0.3 * float(W.norm() * torch.linalg.vector_norm(X, dim=0).max())
        assert float((found - exact).abs().max()) <= most / 2
    assert len(asked) == (0 if layout == "gaps" else 3)


ALIKE = {
    "equal": lambda m, n: torch.full((m, n), 0.1),
    "signs": lambda m, n: 0.1 * gaussian(m, n).sign(),
    "nearly equal": lambda m, n: 1 + 1e-5 * gaussian(m, n),
    "rank one": lambda m, n: gaussian(m, 1).expand(m, n).contiguous(),
}


@avx512
@pytest.mark.parametrize("kind", ALIKE)
@pytest.mark.parametrize("shape", [(4096, 700), (700, 4096)], ids=str)
def test_sums_of_equal_terms_keep_what_the_certificate_counts_on(shape, kind, asked):
    W = ALIKE[kind](*shape)
    X = torch.linalg.qr(torch.cat([torch.ones(shape[1], 1), gaussian(shape[1], 15, seed=1)], dim=1)).Q
    off = ThinProducts(W).times(X) - W.double() @ X.double()
    assert asked
    assert float(torch.linalg.vector_norm(off, dim=0).max() / W.double().norm()) <= 4 * EPS * math.sqrt(max(shape))


@avx512
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [*ALIKE, "random"])
@pytest.mark.parametrize("shape", [(2048, 700), (1300, 1300), (4001, 601)], ids=str)
def test_the_rounding_of_a_gram_matrix_is_what_the_filter_counts_on(shape, kind, layout, asked):
    W = LAYOUTS[layout](ALIKE.get(kind, gaussian)(*shape))
    scale = torch.linalg.matrix_norm(W.double(), 2)
    exact = W.mT.double() @ W.double() / scale**2
    found = _gram(W, scale)
    assert asked
    assert torch.equal(found, found.mT)
    assert float(torch.linalg.matrix_norm(found.double() - exact, 2)) <= 8 * EPS


@avx512
def test_the_decomposition_of_a_large_matrix_is_made_by_it(asked):
    W = gaussian(900, 1100) + 9 * gaussian(900, 3, seed=1) @ gaussian(3, 1100, seed=2)
    found = pss.dominant_directions(W, tol=1e-4)
    assert asked
    assert {call.shape for call in asked} == {(900, 1100), (1100, 900)}
    S = torch.linalg.svdvals(W.double())
    torch.testing.assert_close(found.S.double(), S[: int(found.k)], rtol=1e-5, atol=0.0)


@avx512
def test_whether_a_large_matrix_is_definite_is_told_by_it(asked):
    A = gaussian(1500, 1500)
    A = A @ A.mT + 300 * torch.eye(1500)
    least = float(torch.linalg.eigvalsh(A.double())[0])
    assert positive_definite(A - 0.99 * least * torch.eye(1500))
    assert not positive_definite(A - 1.01 * least * torch.eye(1500))
    assert asked


@avx512
def test_the_same_bits_each_time():
    W, X = gaussian(900, 1100), gaussian(16, 1100, seed=1)
    assert torch.equal(onednn.product(X, W.mT), onednn.product(X, W.mT))


@avx512
def test_full_precision_whatever_the_program_has_set(asked):
    W = gaussian(900, 1100) + 9 * gaussian(900, 3, seed=1) @ gaussian(3, 1100, seed=2)
    plain, before = pss.dominant_directions(W, tol=1e-4), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        loose = pss.dominant_directions(W, tol=1e-4)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(loose.S, plain.S)
    assert torch.equal(loose.U, plain.U)
    assert asked
    assert {call.precision for call in asked} <= {"ieee", "none"}


@avx512
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_it_serves_where_it_is_known_to_gain():
    W = gaussian(900, 1100)
    assert onednn.serves(W, 8)
    assert onednn.serves(W.mT, 8)
    assert onednn.serves(gaussian(512, 512), 64)
    assert not onednn.serves(gaussian(512, 512), 16)
    assert not onednn.serves(gaussian(16, 100_000), 1000)
    assert not onednn.serves(with_gaps(W), 8)
    assert not onednn.serves(W.double(), 8)
    assert not onednn.serves(W[None], 8)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn.serves(W, 8)


@avx512
def test_it_is_found_under_its_newer_name(fresh, monkeypatch):
    linear = onednn._linear()
    onednn._linear.cache_clear()
    monkeypatch.setattr(torch.ops, "onednn", torch.ops.mkldnn)
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert onednn._linear() is linear


@pytest.mark.parametrize("lacks", ["registers", "library", "operation"])
def test_without_it_torch_multiplies(lacks, fresh, monkeypatch):
    if lacks == "registers":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    if lacks == "library":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    if lacks == "operation":
        monkeypatch.setattr(torch.ops, "mkldnn", object())
        monkeypatch.setattr(torch.ops, "onednn", object())
    W, X = gaussian(900, 1100), gaussian(16, 1100, seed=1)
    assert not onednn.serves(W, 16)
    assert torch.equal(onednn.product(X, W.mT), X @ W.mT)
