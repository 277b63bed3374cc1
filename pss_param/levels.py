# SPDX-License-Identifier: Apache-2.0
r"""What lies above a level, for a batch of matrices on a GPU.

# Note [Levels on a GPU]
Inside of a dense bulk, where a trigger's levels lie, a thin iteration does not come to rest, and the whole spectrum
takes a GPU's library 9 ms for each matrix of 768 columns, one after the other. Products of a batch of Gram matrices
with thin blocks take a fraction of a millisecond for all. So

1. what has nothing above its level is told by a Cholesky factor: :mod:`pss_param.below`;
2. for the rest random blocks of ``b`` columns go through Chebyshev polynomials of ``G`` that are small on ``[0, a]``,
   ``a`` a fifth below ``c^2``, orthonormalised whenever the largest directions have outgrown the smallest wanted ones
   so far that a Cholesky factor could not tell them apart any more;
3. one Rayleigh-Ritz step makes triplets of them, ``k`` of which are above ``c``, and measures their residuals ``R``;
4. a Cholesky factor proves that nothing was missed. If

       A = x I - G + D V V^T,    x = c^2 (1 + t)^2,

   has one, no ``y`` orthogonal to ``V`` has ``|W y| > c (1 + t) |y|``, so what is left of the matrix, ``(I - U U^T) W
   (I - V V^T)``, loses at most ``t`` of the Frobenius norm to a smoothing (Note [Nothing above a level]), and ``error
   <= ||R||_F + t + rounding``.

What has too many values above its level, or no proof, is left to the whole spectrum.

References:
    Zhou, Saad, Tiago and Chelikowsky, "Chebyshev-filtered subspace iteration", J. Comput. Phys. 219 (2006);
    Sylvester's law of inertia, Golub and Van Loan, "Matrix Computations", 8.1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pss_param.below import below, empty, gram_of, tops_of
from pss_param.blocks import orthonormal
from pss_param.certificate import Request, Verdict
from pss_param.eigen import eigh
from pss_param.found import Found

__all__ = ["above_levels"]

_ROUNDING = 1e-5
"""The part of the tolerance that is kept for the rounding of a float32 weight's norm."""
_MOST_ELEMENTS = 1 << 24  # of W, worked on at once in float64: the peak is some ten times their bytes in float32
_FILTER_FROM = 192  # columns; the whole spectrum of fewer takes less
_SHARES = (8, 4)  # of the columns that a block may be wide: one after the other, while there is more above the level
_ROOM = 8  # columns that have to be left below the level
_EDGE = 0.8  # of the squared level: what is below is damped
_GROWTH = 16.0  # logarithm of the amplification at the level itself
_RANGE = 12.0  # and of the largest one between two orthonormalisations
_LEAK = 0.8  # the share of the tolerance that residuals may take


class _Ritz(NamedTuple):
    """Ritz vectors as rows, descending, with the residuals of their eigenvalues."""

    rows: Tensor  # (B, b, n)
    values: list[list[float]]
    lengths: list[list[float]]


def above_levels(W: Tensor, scale: Tensor, requests: list[Request], which: list[int], seed: int) -> dict[int, Found]:
    """Triplets above a level, by Note [Levels on a GPU].

    Args:
        W: ``(B, m, n)``.
        scale: ``||W||_F`` of each, not zero.
        requests: what is wanted of each; only levels are looked at.
        which: the matrices to look at.
        seed: of random columns.

    Returns:
        By place in the batch; what is not here is left to the whole spectrum.
    """
    asked = [i for i in which if (requests[i].level or 0.0) > 0 and requests[i].tol > 4 * _ROUNDING]
    size, found = max(1, _MOST_ELEMENTS // (W.shape[1] * W.shape[2])), dict[int, Found]()
    for start in range(0, len(asked), size):
        found |= _of_some(W, scale, requests, asked[start : start + size], seed)
    return found


def _of_some(W: Tensor, scale: Tensor, requests: list[Request], some: list[int], seed: int) -> dict[int, Found]:
    part, levels, tols = W[some], [requests[i].level or 0.0 for i in some], [requests[i].tol for i in some]
    G = gram_of(part, scale[some])
    batch = _Batch(part, G, scale[some], levels, tops_of(G).tolist(), tols)
    rest = below(G, [level * (1 + tol - _ROUNDING) for level, tol in zip(levels, tols, strict=True)])
    found = {i: empty(W[i], batch.tops[j], requests[i]) for j, i in enumerate(some) if rest[j]}
    left = [j for j, none in enumerate(rest) if not none]
    for share in _SHARES if G.shape[-1] >= _FILTER_FROM else ():
        if left:
            triplets = dict(zip(left, _filtered(batch.of(left), share, seed), strict=True))
            found |= {some[j]: one for j, one in triplets.items() if one is not None}
            left = [j for j, one in triplets.items() if one is None]
    return found


class _Batch(NamedTuple):
    """What is looked at together."""

    W: Tensor
    G: Tensor
    scale: Tensor
    levels: list[float]
    tops: list[float]
    tols: list[float]

    def of(self, which: list[int]) -> _Batch:
        """Some of it."""
        numbers = ([column[i] for i in which] for column in self[3:])
        return _Batch(self.W[which], self.G[which], self.scale[which], *numbers)


def _filtered(batch: _Batch, share: int, seed: int) -> list[Found | None]:
    ritz = _ritz(batch.G, _block(batch, batch.G.shape[-1] // share, seed))
    verdicts = [
        _verdict(values, lengths, level, tol, batch.W)
        for values, lengths, level, tol in zip(ritz.values, ritz.lengths, batch.levels, batch.tols, strict=True)
    ]
    proved = _proved(batch, ritz.rows, verdicts)
    triplets = _triplets(batch, ritz, max((verdict.k for verdict in verdicts if verdict), default=0))
    return [
        _one(triplets, ritz, i, verdict, tol) if verdict is not None and fine else None
        for i, (verdict, fine, tol) in enumerate(zip(verdicts, proved, batch.tols, strict=True))
    ]


def _block(batch: _Batch, columns: int, seed: int) -> Tensor:
    """Rows ``(B, columns, n)`` that span what is above the levels, orthonormal."""
    G, edges = batch.G, [_EDGE * level * level for level in batch.levels]
    random = torch.randn(columns, G.shape[-1], generator=torch.Generator().manual_seed(seed), device="cpu")
    rows = orthonormal((random.to(G) @ G).mT).mT
    steepest = max(_rate(top * top / edge) for top, edge in zip(batch.tops, edges, strict=True))
    degree, at = max(2, math.floor(_RANGE / steepest)), G.new_tensor(edges)[:, None, None]
    for _ in range(math.ceil(_GROWTH / (degree * _rate(1 / _EDGE)))):
        rows = orthonormal(_polynomial(G, rows, at, degree).mT).mT
    return rows


def _rate(ratio: float) -> float:
    """By how much one degree amplifies an eigenvalue that is ``ratio`` times the edge, as a logarithm."""
    return math.acosh(max(2 * ratio - 1, 1 + 1e-12))


def _polynomial(G: Tensor, rows: Tensor, edges: Tensor, degree: int) -> Tensor:
    """``T_d(2 G / a - 1)`` of the rows, of unit length."""
    before, now = rows, rows @ G * (2 / edges) - rows
    for _ in range(degree - 1):
        before, now = now, now @ G * (4 / edges) - 2 * now - before
    unit: Tensor = now / torch.linalg.vector_norm(now, dim=-1, keepdim=True)
    return unit


def _ritz(G: Tensor, rows: Tensor) -> _Ritz:
    image = rows @ G
    core = image @ rows.mT
    values, Y = eigh((core + core.mT) / 2)
    values, Y = values.flip(-1), Y.flip(-1).mT
    rows, image = Y @ rows, Y @ image
    lengths = torch.linalg.vector_norm(image - values[..., None] * rows, dim=-1)
    numbers = torch.stack([values, lengths]).tolist()
    return _Ritz(rows, numbers[0], numbers[1])


def _verdict(values: list[float], lengths: list[float], level: float, tol: float, W: Tensor) -> Verdict | None:
    """How many are taken, and what their residuals leave of the tolerance; ``None`` where that is too little."""
    S = [math.sqrt(max(value, 0.0)) for value in values]
    k = sum(s > level for s in S)
    if k > len(S) - _ROOM:
        return None
    residuals = [length / s for length, s in zip(lengths[:k], S[:k], strict=True)]
    rounding = 4 * torch.finfo(W.dtype).eps * math.sqrt(max(W.shape[-2:]))
    leak = math.sqrt(sum(r * r for r in residuals)) + rounding + _ROUNDING
    return Verdict(k, S[k], math.nan, leak, True) if leak <= _LEAK * tol else None


def _proved(batch: _Batch, rows: Tensor, verdicts: list[Verdict | None]) -> list[bool]:
    """Whether nothing was missed: the Cholesky factor of Note [Levels on a GPU]."""
    G, known = batch.G, [verdict or Verdict(0, 0.0, math.nan, math.inf, False) for verdict in verdicts]
    room = [
        level * (1 + max(0.0, tol - verdict.error))
        for level, tol, verdict in zip(batch.levels, batch.tols, known, strict=True)
    ]
    counts = torch.tensor([verdict.k for verdict in known], device=G.device)
    taken = torch.arange(rows.shape[-2], device=G.device) < counts[:, None]
    weights = 2 * G.new_tensor(batch.tops).square()[:, None] * taken
    return below(G - rows.mT @ (weights[..., None] * rows), room)


def _triplets(batch: _Batch, ritz: _Ritz, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """``U, S, Vh`` of all, as many as the one with the most has."""
    W, Vh = batch.W, ritz.rows[:, :most].to(batch.W.dtype)
    wide = W.shape[-2] < W.shape[-1]
    product = (W.mT if wide else W) @ Vh.mT
    length = torch.linalg.vector_norm(product, dim=-2)
    U, S = product / length[:, None, :], length / batch.scale.to(W.dtype)[:, None]
    return (Vh.mT, S, U.mT) if wide else (U, S, Vh)


def _one(triplets: tuple[Tensor, Tensor, Tensor], ritz: _Ritz, index: int, leaked: Verdict, tol: float) -> Found:
    U, S, Vh = (part[index] for part in triplets)
    k, values = leaked.k, ritz.values[index]
    residual = [length / math.sqrt(value) for length, value in zip(ritz.lengths[index][:k], values[:k], strict=True)]
    verdict = Verdict(k, leaked.edge, math.nan, tol, True)
    return Found(U[:, :k], S[:k], Vh[:k], S.new_tensor(residual), math.sqrt(values[0]), verdict)
