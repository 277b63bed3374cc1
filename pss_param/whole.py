# SPDX-License-Identifier: Apache-2.0
r"""One matrix by its Gram matrix: the filtered block, the whole spectrum, or an SVD where squares are too coarse.

# Note [Squares on a GPU]
On a GPU the Gram matrix and all that comes of it are float64: there the eigenvalues of a float64 matrix take no longer
than those of a float32 one (768 x 768 on an H100: 8.7 ms against 8.8), the products of float32 are less exact than a
CPU's, and squares of float64 keep the digits of all values down to 1e-6 of the largest, so that an SVD, which takes
four to eight times as long there (35 ms), is hardly ever needed. GPUs that are not made for float64 may lose some of
that. On a CPU float64 costs twice the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from pss_param import onednn
from pss_param.below import gram_of
from pss_param.certificate import Request, Spectrum, judge
from pss_param.counts import leading
from pss_param.filtered import COARSE, WIDEST, dominant_by_filter
from pss_param.found import Found
from pss_param.levels import above_levels
from pss_param.products import ThinProducts, on_gpu

# Below, the eigenvalues of all cost less than the many small operations of a filter (1.6 ms at 192 with one thread).
_FILTER_FROM = 192

WHOLE_BELOW_ON_GPU = 1024
"""On a GPU Gram matrices serve from the start up to this size: Note [Many matrices on a GPU] in ``solver``."""

_SQUARABLE = (1e-12, 1e12)  # norms whose squares, and those of small values beside them, stay in float32


def dense(W: Tensor, scale: Tensor, request: Request, seed: int, start: Tensor | None = None) -> Found:
    """Dominant triplets of one matrix that is small, or whose values crowd around the edge.

    Args:
        W: ``(m, n)``.
        scale: ``||W||_F``, not zero.
        request: what is wanted.
        seed: of random columns.
        start: directions that are known already, ``(min(m, n), b)``, of the side that :func:`from_the_left` tells.

    Returns:
        The triplets with their certificate.
    """
    if from_the_left(W):
        return dense(W.mT, scale, request, seed, start).of_transpose
    m, n = W.shape
    # The least value of a nearly square matrix is lost in the square.
    if request.rank == n and m < 2 * n and not on_gpu(W):
        return _whole_by_svd(W / scale.to(W.dtype), request)
    if not _SQUARABLE[0] < float(scale) < _SQUARABLE[1]:
        reach = -round(math.log2(torch.finfo(W.dtype).tiny))
        # By a power of two, so that the result is the same but for its scale.
        shrink = 2.0 ** max(-reach, min(reach, -math.frexp(float(scale))[1]))
        W, scale = W * shrink, scale * shrink
    gram = _gram(W, scale)
    some = request.level is None and not request.bulk and (request.rank is None or 0 < request.rank < n)
    if some and n > (WHOLE_BELOW_ON_GPU if on_gpu(W) else _FILTER_FROM - 1):
        found = _by_filter(W, gram, scale, request, seed, start)
        if found is not None:
            return found
    return _whole(W, gram, scale, request)


def from_the_left(W: Tensor) -> bool:
    """Whether the Gram matrix is ``W W^T``: of the smaller side, or of the rows of a square matrix that lie in a row.

    Args:
        W: ``(m, n)``.

    Returns:
        The answer.
    """
    m, n = W.shape
    return m < n or (m == n and W.stride(1) < W.stride(0) and not on_gpu(W))


def is_small_on_gpu(W: Tensor) -> bool:
    """Whether :func:`dense_together` serves.

    Args:
        W: ``(..., m, n)``.

    Returns:
        The answer of Note [Many matrices on a GPU] in :mod:`pss_param.solver`.
    """
    return on_gpu(W) and min(W.shape[-2:]) <= WHOLE_BELOW_ON_GPU


def dense_together(groups: Sequence[Tensor], scale: Tensor, requests: list[Request], seed: int) -> list[Found]:
    """The same of many matrices: together by :mod:`pss_param.levels` and :mod:`pss_param.counts` where these serve.

    Args:
        groups: matrices of one smaller side, by shape: ``(B_i, m_i, n_i)``.
        scale: ``||W||_F`` of all of them in turn, not zero.
        requests: what is wanted of each.
        seed: of random columns.

    Returns:
        One result each.
    """
    places = list(range(len(requests)))
    found = above_levels(groups, scale, requests, places, seed) | leading(groups, scale, requests, places, seed)
    matrices = chain(*groups)
    return [found[i] if i in found else dense(W, scale[i], requests[i], seed) for i, W in enumerate(matrices)]


def _by_filter(
    W: Tensor, gram: Tensor, scale: Tensor, request: Request, seed: int, start: Tensor | None
) -> Found | None:
    if start is None:
        # The sum of squared eigenvalues is at most the largest one: the stable rank is at most its inverse, and near
        # half of that in a flat matrix.
        most = 1.0 / max(float(torch.linalg.vector_norm(gram)) ** 2, 1e-30)
        if request.rank is None and most * WIDEST > gram.shape[0]:
            return None
        start = gram @ _gaussian(gram, gram.shape[0] // 8, seed)
    return dominant_by_filter(W, gram, scale, request, start.to(gram.dtype))


def _gaussian(gram: Tensor, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(columns, gram.shape[0], generator=generator, device="cpu").to(gram).mT


def _whole(W: Tensor, gram: Tensor, scale: Tensor, request: Request) -> Found:
    """By all eigenvalues of the Gram matrix."""
    arithmetic = gram.dtype if on_gpu(W) else W.dtype
    eps, tiny = torch.finfo(arithmetic).eps, torch.finfo(arithmetic).tiny
    values, V = torch.linalg.eigh(gram)
    S = values.clamp_min(0).sqrt().flip(0).to(arithmetic)
    # A square s^2 carries a rounding of some eps * S[0]^2: s is off by that over s, and by no more than its root.
    rounding = 8 * eps * S[:1].square()
    residual = torch.minimum(rounding / S.clamp_min(tiny), rounding.sqrt())
    stored = torch.finfo(W.dtype).eps
    verdict = judge(Spectrum(S.tolist(), residual.tolist(), (W.shape[0], W.shape[1]), True, stored), request)
    lowest = max(verdict.edge, request.level or 0.0, 0.0 if math.isnan(verdict.bulk_edge) else verdict.bulk_edge)
    if on_gpu(W) and verdict.k == len(S):
        lowest = float(S[-1])
    if not (verdict.error <= request.tol and lowest > COARSE * math.sqrt(eps) * float(S[0])):
        return _whole_by_svd(W / scale.to(W.dtype), request)
    V = V.mT.flip(0)[: verdict.k].to(arithmetic).mT
    product = ThinProducts(W).times(V) if arithmetic == W.dtype else torch.cat([r.double() @ V for r in _row_blocks(W)])
    length = torch.linalg.vector_norm(product, dim=0)
    U, lengths = product / length, length / scale.to(arithmetic)
    U, lengths, Vh, residual = (part.to(W.dtype) for part in (U, lengths, V.mT, residual[: verdict.k]))
    return Found(U, lengths, Vh, residual, float(S[0]), verdict)


_WIDE_GRAM = 64  # columns up to which a Gram matrix in float64 costs little beside its eigenvalues

_ROW_BLOCK = 1 << 24  # elements

_STRIP, _TERMS = 512, 384  # rows of a Gram matrix, and terms of its sums, that are computed at once


def _gram(W: Tensor, scale: Tensor) -> Tensor:
    """``W^T W / ||W||_F^2``, in float64 where that costs little beside the eigenvalues: if small, and on a GPU."""
    if on_gpu(W):
        return gram_of(W[None], scale[None])[0]
    if W.shape[1] <= _WIDE_GRAM:
        W = W.double()
    return _squares(W).mul_((1.0 / scale).square().to(W.dtype))


def _row_blocks(W: Tensor) -> tuple[Tensor, ...]:
    return torch.split(W, max(1, _ROW_BLOCK // W.shape[1]))


def _squares(W: Tensor) -> Tensor:
    """``W^T W``: what lies above the diagonal, in strips, and its copy: 0.7 of the time from 2048 on."""
    # A sum is broken off after some hundred terms: a kernel may add thousands one after the other, and where all are
    # equal, as in a matrix of signs, every addition rounds to the same side.
    n = W.shape[1]
    square = W.new_zeros(n, n)
    for part in torch.split(W, _terms(W.shape[0])):
        rows = part.mT.contiguous()
        for i in range(0, n, _STRIP):
            square[i : i + _STRIP, i:] += onednn.product(rows[i : i + _STRIP], rows[i:].mT)
    for i in range(0, n, _STRIP):
        square[i + _STRIP :, i : i + _STRIP] = square[i : i + _STRIP, i + _STRIP :].mT
    return square


def _terms(m: int) -> int:
    """Of a sum: equally many in each, where that can be, since oneDNN prepares each shape that it has not seen."""
    return next((terms for terms in range(_TERMS, _TERMS // 2, -1) if m % terms == 0), _TERMS)


def _whole_by_svd(W: Tensor, request: Request) -> Found:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    eps = torch.finfo(S.dtype).eps
    residual = (4 * eps * S[:1]).expand_as(S)
    verdict = judge(Spectrum(S.tolist(), residual.tolist(), (W.shape[0], W.shape[1]), True, eps), request)
    k = verdict.k
    return Found(U[:, :k], S[:k], Vh[:k], residual[:k], float(S[0]), verdict)
