# SPDX-License-Identifier: Apache-2.0
r"""Dominant triplets of a batch of matrices: which algorithm serves which matrix.

# Note [Which algorithm serves which matrix]
Every matrix starts on the block Krylov iteration of :mod:`pss_param.krylov`. Its measured residuals decide when it
stops and its Ritz values decide how wide the block must be. When the basis that the wanted values need would fill
half of the smaller dimension, thin products no longer pay, and the whole spectrum is computed instead; so tiny
matrices, flat spectra with many wanted values, and tolerances beyond the reach of an iteration all end there. The
whole spectrum comes from the Gram matrix of the smaller side where its squared values keep enough digits for the
values that are asked for, and from ``torch.linalg.svd`` where they do not. A matrix whose pieces lie on several
devices is never put together: its iteration goes on, to a full basis if need be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pss_param.certificate import OVERSAMPLING, Request, Spectrum, Verdict, judge, leak
from pss_param.krylov import Krylov, Matrix, Ritz

FIRST_BLOCK = 16
"""Columns of the first sketch: as many as a pass over a large matrix on a CPU carries at no extra time."""

# An iteration takes about four blocks to show that it has converged. Where twice as many would fill the smaller side,
# the whole spectrum costs less than the small eigenvalue problems on the way (measured with one thread at 128 x 128:
# 1.8 ms against 2.6 to 7 ms; at 256 x 256 either may win).
_BLOCKS_THAT_PAY = 8

_CPU_CHUNK = 1 << 14  # elements of W worked on at once: beyond it, a batch runs no faster on a CPU than its matrices
_CUDA_CHUNK = 1 << 29
_ROW_BLOCK = 1 << 22  # elements of W that a measurement by rows holds twice


@dataclass(frozen=True)
class Found:
    """Dominant triplets of one matrix, scaled to ``||W||_F = 1``.

    Attributes:
        U: ``(m, k)``.
        S: ``(k,)``.
        Vh: ``(k, n)``.
        residual: ``||W^T u - s v||`` of each, ``(k,)``.
        top: the largest singular value, also where ``k = 0``.
        verdict: ``k``, edge and error.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    residual: Tensor
    top: float
    verdict: Verdict


def solve(W: Tensor, norms: Tensor, requests: list[Request], seed: int, init: Tensor | None) -> list[Found]:
    """Find the dominant triplets of each matrix of a batch.

    Args:
        W: finite matrices ``(B, m, n)`` in the dtype to compute in.
        norms: their Frobenius norms ``(B,)``.
        requests: what is wanted of each.
        seed: of the sketch; every chunk draws the same, so no result depends on what a matrix was batched with.
        init: right directions known from before, ``(B, n, b)``.

    Returns:
        One result a matrix.
    """
    if W.shape[1] < W.shape[2]:  # the Krylov basis lives on the smaller side
        start = None if init is None else W @ init
        found = solve(W.mT, norms, requests, seed, start)
        return [replace(one, U=one.Vh.mT, Vh=one.U.mT) for one in found]
    size = max(1, (_CUDA_CHUNK if W.is_cuda else _CPU_CHUNK) // (W.shape[1] * W.shape[2]))
    scale = torch.where(norms > 0, norms, torch.ones_like(norms))
    found = []
    for start_row in range(0, W.shape[0], size):
        rows = slice(start_row, start_row + size)
        part = None if init is None else init[rows]
        found += _solve_chunk(W[rows], scale[rows], requests[rows], seed, part)
    return found


def solve_sharded(W: Matrix, norms: Tensor, request: Request, seed: int, init: Tensor | None) -> Found:
    """Find the dominant triplets of one matrix ``(1, m, n)`` of which only thin products are to be had.

    Args:
        W: the matrix; all ranks that hold a piece must call.
        norms: its Frobenius norm ``(1,)``.
        request: what is wanted.
        seed: of the sketch, the same on all ranks.
        init: right directions known from before, ``(1, n, b)``.

    Returns:
        The same bits on every rank, if ``W`` gives the same products on every rank.
    """
    scale = torch.where(norms > 0, norms, torch.ones_like(norms))
    width = min(min(W.shape[1:]), max(FIRST_BLOCK, (request.rank or 0) + OVERSAMPLING))
    krylov = Krylov(W, scale, torch.Generator().manual_seed(seed))
    krylov.start(width, init)
    ritz, verdicts = _iterate(krylov, [request], widest=W.shape[2])
    verdict = verdicts[0]
    return _leading(krylov, ritz, 0, verdict if verdict is not None else _verdict(krylov, ritz, 0, request))


def _solve_chunk(W: Tensor, scale: Tensor, requests: list[Request], seed: int, init: Tensor | None) -> list[Found]:
    width = max([FIRST_BLOCK, *((request.rank or 0) + OVERSAMPLING for request in requests)])
    if _BLOCKS_THAT_PAY * width >= W.shape[2]:
        return [_whole(W[i] / scale[i].to(W.dtype), request) for i, request in enumerate(requests)]
    krylov = Krylov(W, scale, torch.Generator().manual_seed(seed))
    krylov.start(width, init)
    ritz, verdicts = _iterate(krylov, requests, widest=W.shape[2] // 2)
    return [
        _leading(krylov, ritz, i, verdict) if verdict is not None else _whole(W[i] / scale[i].to(W.dtype), requests[i])
        for i, verdict in enumerate(verdicts)
    ]


def _iterate(krylov: Krylov, requests: list[Request], widest: int) -> tuple[Ritz, list[Verdict | None]]:
    """Run until every matrix has its verdict; ``None`` for those that would need a basis wider than ``widest``."""
    while True:
        ritz = krylov.ritz()
        verdicts = _verdicts(krylov, ritz, requests)
        missing = max(verdict.k for verdict in verdicts) + OVERSAMPLING - krylov.random_columns
        if krylov.rank >= widest or (missing <= 0 and all(verdict.enough for verdict in verdicts)):
            return ritz, [verdict if verdict.enough else None for verdict in verdicts]
        fresh = max(0, missing - krylov.young_columns)
        columns = min(krylov.next_columns + fresh, krylov.W.shape[2] - krylov.rank)
        if krylov.rank + columns > widest:
            mature = krylov.random_columns - OVERSAMPLING
            return ritz, [verdict if verdict.enough and verdict.k <= mature else None for verdict in verdicts]
        krylov.expand(fresh, columns)


def _verdicts(krylov: Krylov, ritz: Ritz, requests: list[Request]) -> list[Verdict]:
    values, residuals = torch.stack([ritz.S, ritz.residual]).tolist()  # the only synchronisation of a step
    verdicts = []
    for i, request in enumerate(requests):
        seen = _spectrum(krylov, ritz, values[i], residuals[i])
        verdict = judge(seen, request)
        if verdict.faint and isinstance(krylov.W, Tensor):
            seen = replace(seen, tail=_tail(krylov.W[i], krylov, ritz, i, max(0, len(seen.S) - OVERSAMPLING)))
            verdict = judge(seen, request)
        verdicts.append(verdict if verdict.enough else _closer(krylov, ritz, i, seen, verdict, request))
    return verdicts


def _closer(krylov: Krylov, ritz: Ritz, index: int, seen: Spectrum, verdict: Verdict, request: Request) -> Verdict:
    """A second look with ceilings, where what they cost may save passes: where the residuals are small enough."""
    level = request.level if request.level is not None else verdict.bulk_edge if request.bulk else verdict.edge
    if not (verdict.k < len(seen.S) and level > 0 and leak(seen, level, verdict.k) <= request.tol):
        return verdict
    ceilings = krylov.ceilings(ritz, index, level)
    if ceilings is None:
        return verdict
    second = judge(replace(seen, ceilings=ceilings), request)
    return second if second.k <= verdict.k else verdict  # the ceilings hold down to the first verdict's edge


def _verdict(krylov: Krylov, ritz: Ritz, index: int, request: Request) -> Verdict:
    return judge(_spectrum(krylov, ritz, ritz.S[index].tolist(), ritz.residual[index].tolist()), request)


def _spectrum(krylov: Krylov, ritz: Ritz, values: list[float], residuals: list[float]) -> Spectrum:
    _, m, n = krylov.W.shape
    return Spectrum(values, residuals, (m, n), krylov.rank >= min(m, n), torch.finfo(ritz.S.dtype).eps)


def _tail(W: Tensor, krylov: Krylov, ritz: Ritz, index: int, count: int) -> tuple[int, float]:
    """Squared norm of one matrix without its leading triplets, measured block of rows by block of rows."""
    U, S, Vh = krylov.triplets(ritz, index, count)
    inverse, energy = krylov.inverse_scale[index], 0.0
    rows = max(1, _ROW_BLOCK // W.shape[1])
    for start in range(0, W.shape[0], rows):
        rest = W[start : start + rows] * inverse - (U[start : start + rows] * S) @ Vh
        energy += float(torch.linalg.vector_norm(rest)) ** 2
    return count, energy


def _leading(krylov: Krylov, ritz: Ritz, index: int, verdict: Verdict) -> Found:
    U, S, Vh = krylov.triplets(ritz, index, verdict.k)
    return Found(U, S, Vh, ritz.residual[index, : verdict.k], float(ritz.S[index, 0]), verdict)


def _whole(W: Tensor, request: Request) -> Found:
    """By the eigenvalues of the Gram matrix of one tall matrix, or by an SVD where squares are too coarse."""
    eps, tiny = torch.finfo(W.dtype).eps, torch.finfo(W.dtype).tiny
    values, V = torch.linalg.eigh(_gram(W))
    S = values.clamp_min(0).sqrt().flip(0).to(W.dtype)
    # A square s^2 carries a rounding of eps * S[0]^2. Nothing exceeds ||W||_F = 1, and squares must not overflow.
    residual = (8 * eps * S[:1].square() / S.clamp_min(tiny)).clamp_max(1.0)
    verdict = judge(Spectrum(S.tolist(), residual.tolist(), (W.shape[0], W.shape[1]), True, eps), request)
    lowest = max(verdict.edge, request.level or 0.0, 0.0 if math.isnan(verdict.bulk_edge) else verdict.bulk_edge)
    if not (verdict.error <= request.tol and lowest > _COARSE * math.sqrt(eps) * float(S[0])):
        return _whole_by_svd(W, request)
    V = V.flip(1)[:, : verdict.k].to(W.dtype)
    product = W @ V
    length = torch.linalg.vector_norm(product, dim=0)
    return Found(product / length, length, V.mT, residual[: verdict.k], float(S[0]), verdict)


# Values below this many square roots of the rounding unit, times S[0], have lost half of their digits in the square.
_COARSE = 30.0


def _gram(W: Tensor) -> Tensor:
    """``W^T W``, in float64 where that costs little beside the eigenvalues: for small matrices."""
    if W.shape[1] <= FIRST_BLOCK**2:
        W = W.double()
    return W.mT @ W


def _whole_by_svd(W: Tensor, request: Request) -> Found:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    eps = torch.finfo(S.dtype).eps
    residual = (4 * eps * S[:1]).expand_as(S)
    verdict = judge(Spectrum(S.tolist(), residual.tolist(), (W.shape[0], W.shape[1]), True, eps), request)
    k = verdict.k
    return Found(U[:, :k], S[:k], Vh[:k], residual[:k], float(S[0]), verdict)
