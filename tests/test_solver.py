# SPDX-License-Identifier: Apache-2.0
"""The solver where nothing but thin products is to be had, down to matrices smaller than a block."""

from __future__ import annotations

import math

import pytest
import torch
from spectra import gaussian, power, with_spectrum

from pss_param.blocks import orthonormal
from pss_param.certificate import Request
from pss_param.krylov import Krylov
from pss_param.smoothing import smooth
from pss_param.solver import solve_sharded
from pss_param.spectrum import directions_together, dominant_directions

SHAPES = [(16, 8), (8, 8), (12, 5), (9, 1), (40, 30), (3, 2), (32, 8), (60, 60), (90, 33)]
REQUESTS = {
    "stable rank": Request(),
    "level": Request(level=0.3),
    "bulk": Request(bulk=True),
    "rank 2": Request(rank=2),
    "norm": Request(rank=0),
}


class OnlyProducts:
    """A matrix that can be multiplied and nothing else."""

    def __init__(self, W: torch.Tensor) -> None:
        self._W, self.shape, self.dtype, self.device = W, W.shape, W.dtype, W.device
        self.passes = 0

    def __matmul__(self, X: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return self._W @ X

    def __rmatmul__(self, Y: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return Y @ self._W


@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["flat", "low rank"])
def test_thin_products_are_enough_for_any_shape(shape, kind, request_name):
    W = gaussian(*shape) if kind == "flat" else with_spectrum(*shape, power(min(shape), 3.0))
    norm = torch.linalg.matrix_norm(W)
    S = torch.linalg.svdvals(W) / norm
    found = solve_sharded(OnlyProducts(W[None]), norm[None], REQUESTS[request_name], 1, None)
    k = found.verdict.k
    assert found.verdict.enough
    assert found.verdict.error <= 1e-3
    assert found.U.shape == (shape[0], k)
    assert found.Vh.shape == (k, shape[1])
    torch.testing.assert_close(found.S, S[:k], rtol=0, atol=3e-3)  # a value at the edge may move by the tolerance
    if request_name == "level":
        assert k == int((S > 0.3).sum())


def test_a_warm_start_takes_fewer_passes_where_a_cold_one_takes_many():
    W = with_spectrum(600, 500, power(500, 0.5)).float()
    norm = torch.linalg.matrix_norm(W).double()
    cold, warm = OnlyProducts(W[None]), OnlyProducts(W[None])
    first = solve_sharded(cold, norm[None], Request(rank=20, tol=1e-4), 1, None)
    again = solve_sharded(warm, norm[None], Request(rank=10, tol=1e-4), 1, first.Vh.mT[None])
    alone = OnlyProducts(W[None])
    solve_sharded(alone, norm[None], Request(rank=10, tol=1e-4), 1, None)
    assert warm.passes < alone.passes
    torch.testing.assert_close(again.S, first.S[:10], rtol=1e-3, atol=0)


def test_a_start_wider_than_the_matrix_is_left_aside():
    W = gaussian(8, 60)
    norm = torch.linalg.matrix_norm(W)
    found = solve_sharded(OnlyProducts(W[None]), norm[None], Request(rank=2), 1, torch.randn(1, 60, 9, dtype=W.dtype))
    torch.testing.assert_close(found.S, torch.linalg.svdvals(W)[:2] / norm, rtol=0, atol=3e-3)


@pytest.mark.parametrize("columns", [3, 60])
@pytest.mark.parametrize("fall", [0.0, 4.0, 9.0])
def test_blocks_are_orthonormal_however_dependent(columns, fall):
    block = (gaussian(900, columns) @ torch.diag(10.0 ** -torch.linspace(0, fall, columns).double())).float()
    mixed = block @ gaussian(columns, columns, 1).float()
    Q = orthonormal(mixed)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(columns), rtol=0, atol=2e-5)


def test_a_core_that_is_full_has_seen_everything():
    W = gaussian(40, 24)
    krylov = Krylov(W, torch.linalg.matrix_norm(W), 0)
    krylov.start(krylov.right_sketch(8))
    while not krylov.complete:
        krylov.advance(3)
    S = torch.linalg.svdvals(W) / torch.linalg.matrix_norm(W)
    assert krylov.ritz().S[0][:24] == pytest.approx(S.tolist(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["identity", "two values", "rank three"])
def test_bases_stay_orthonormal_when_the_krylov_space_is_exhausted(kind, dtype):
    values = {
        "identity": [1.0] * 150,
        "two values": [2.0] * 4 + [1.0] * 146,
        "rank three": [3.0, 2.0, 1.0] + [0.0] * 147,
    }
    W = torch.diag(torch.tensor(values[kind], dtype=dtype))
    krylov = Krylov(W, torch.linalg.matrix_norm(W), 0)
    krylov.start(krylov.right_sketch(8))
    for _ in range(18):
        ritz = krylov.ritz()
        assert ritz.S[0][0] <= max(values[kind]) / float(torch.linalg.matrix_norm(W)) * (1 + 1e-5)
        basis = krylov.basis
        torch.testing.assert_close(basis.mT @ basis, torch.eye(basis.shape[1], dtype=dtype), rtol=0, atol=1e-5)
        krylov.advance()


def test_values_of_zero_do_not_spoil_the_gram_matrix(monkeypatch):
    W = gaussian(200, 200).float()
    W[:20] = 0.0  # as behind neurons that died
    S = torch.linalg.svdvals(W.double())
    monkeypatch.setattr("pss_param.whole._whole_by_svd", None)
    found = dominant_directions(W)
    assert bool(found.converged)
    torch.testing.assert_close(found.S.double(), S[: int(found.k)], rtol=1e-5, atol=0)
    torch.testing.assert_close(float(found.edge), float(S[int(found.k)]), rtol=1e-5, atol=0)


@pytest.fixture(params=[128, 1024])
def _as_on_a_gpu(request, monkeypatch):
    for name in ("solver", "whole", "eigen", "krylov", "sketch", "definite"):
        monkeypatch.setattr(f"pss_param.{name}.on_gpu", lambda W: True)
    monkeypatch.setattr("pss_param.whole.WHOLE_BELOW_ON_GPU", request.param)


def clipped(W: torch.Tensor, level: float) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return W - (U * (S - level).clamp_min(0)) @ Vh


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("asked", ["count", "rank", "level", "bulk"])
@pytest.mark.parametrize("shape", [(100, 90), (200, 230), (330, 270)], ids=str)
def test_the_algorithms_for_a_gpu_keep_the_certificate(shape, asked):
    least = min(shape)
    falling = [with_spectrum(*shape, power(least, 0.3 + 0.05 * i), seed=i) * 10.0 ** (i - 8) for i in range(17)]
    exact = torch.stack([*falling, gaussian(*shape), torch.zeros(shape, dtype=torch.float64)])
    levels = 0.6 * torch.linalg.matrix_norm(exact, 2)
    options = {"rank": {"rank": 5}, "level": {"above": levels}, "bulk": {"above": "bulk"}}.get(asked, {})
    found = dominant_directions(exact.float(), tol=1e-3, **options)
    assert bool(found.converged.all())
    reached = {"level": levels, "bulk": found.bulk_edge}.get(asked, found.edge).double()
    for i, W in enumerate(exact):
        d = (found.S[i].double() - reached[i]).clamp_min(0)
        ours = W - (found.U[i].double() * d) @ found.Vh[i].double()
        true = torch.linalg.svdvals(W)[int(found.k[i])] if asked in ("count", "rank") else reached[i]
        assert float((ours - clipped(W, float(true))).norm()) <= (float(found.error[i]) + 1e-6) * float(W.norm())


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_a_float64_matrix_of_rank_one_is_left_as_it_is_on_a_gpu_too():
    W = torch.outer(*gaussian(2, 256))
    torch.testing.assert_close(smooth(W), W, rtol=1e-12, atol=1e-12)


def test_nothing_asked_is_nothing_found():
    assert directions_together([]) == []


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_all_directions_of_a_square_matrix_are_orthonormal_on_a_gpu():
    W = gaussian(100, 100).float()
    found = dominant_directions(W, rank=100)
    torch.testing.assert_close(found.U.mT @ found.U, torch.eye(100), rtol=0, atol=1e-4)
    torch.testing.assert_close((found.U * found.S) @ found.Vh, W, rtol=0, atol=1e-3)


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("options", [{}, {"rank": 7}, {"above": 2.0}, {"above": "bulk"}], ids=str)
def test_matrices_of_several_shapes_are_found_together_as_they_are_alone(options):
    shapes = [(200, 230), (260, 200), (200, 200), (90, 100), (300, 300)]
    Ws = [torch.stack([with_spectrum(*s, 9 * power(min(s), 0.6), seed=i).float() for i in range(2)]) for s in shapes]
    asked = [(W, options.get("rank"), options.get("above"), 1e-3) for W in [*Ws, Ws[0][0]]]
    for (W, *_), one in zip(asked, directions_together(asked), strict=True):
        alone = dominant_directions(W, tol=1e-3, **options)
        assert one.U.shape[:-1] == W.shape[:-1]
        assert torch.equal(one.k, alone.k)
        torch.testing.assert_close(one.S, alone.S, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.edge, alone.edge, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("seed", [92, 334, 583, 900, 975, 1331, 1378, 1409, 1545, 1850])
def test_a_handful_of_entries_are_a_matrix_of_low_rank(seed):
    """Behind its rank a basis is continued by rounding, most of which lies in what it spans already."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.zeros(285, 281)
    W.view(-1)[torch.randperm(W.numel(), generator=generator)[:7]] = torch.randn(7, generator=generator)
    S = torch.linalg.svdvals(W.double())
    found = dominant_directions(W)
    assert int(found.k) == math.floor(float((S / S[0]).square().sum()) * (1 + 1e-4))
    assert float(found.spectral_norm) == pytest.approx(float(S[0]), rel=1e-5)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-6), (torch.float64, 1e-11)], ids=str)
@pytest.mark.parametrize("exponent", [0.5, 2.0, 6.0])
def test_bases_stay_orthonormal_while_columns_converge(exponent, dtype, most):
    S = torch.arange(1, 301, dtype=torch.float64) ** -exponent
    W = ((torch.linalg.qr(gaussian(400, 300)).Q * S) @ torch.linalg.qr(gaussian(300, 300, 1)).Q).to(dtype)
    krylov = Krylov(W, torch.linalg.matrix_norm(W), 0)
    krylov.start(krylov.right_sketch(8))
    for _ in range(16):
        krylov.advance()
    basis = krylov.basis.double()
    assert float((basis.mT @ basis - torch.eye(basis.shape[1], dtype=torch.float64)).abs().max()) < most
