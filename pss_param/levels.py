# SPDX-License-Identifier: Apache-2.0
r"""What lies above a level, for a batch of matrices on a GPU.

# Note [Levels on a GPU]
Inside of a dense bulk, where a trigger's levels lie, a thin iteration does not come to rest, and the whole spectrum
takes a GPU's library 9 ms for each matrix of 768 columns, one after the other. Products of a batch of Gram matrices
with thin blocks take a fraction of a millisecond for all. So

1. what has nothing above its level is told by a Cholesky factor: :mod:`pss_param.below`;
2. for the rest random blocks of ``b`` columns go through Chebyshev polynomials of ``G`` that are small on ``[0, a]``,
   ``a`` a fifth below ``c^2``, orthonormalised whenever the largest directions have outgrown the smallest wanted ones
   so far that a Cholesky factor could not tell them apart any more, which a bound on the largest eigenvalue tells:
   ``||G^32||_F^(1/32)``;
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
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pss_param.below import below, gram_of, nothing, tops_of
from pss_param.blocks import orthonormal
from pss_param.certificate import Request, Verdict
from pss_param.eigen import eigh
from pss_param.found import Found

__all__ = ["above_levels"]

_ROUNDING = 1e-5
"""The part of the tolerance that is kept for the rounding of a float32 weight's norm."""
_MOST_ELEMENTS = 1 << 24  # of W, worked on at once in float64: the peak is some ten times their bytes in float32
_LEAST = 1e-12  # of a level over the norm, whose square is one part in float64
_FILTER_FROM = 192  # columns; the whole spectrum of fewer takes less
_SHARES = (8, 4)  # of the columns that a block may be wide: one after the other, while there is more above the level
_ROOM = 8  # columns that have to be left below the level
_EDGE = 0.8  # of the squared level: what is below is damped
_GROWTH = 16.0  # logarithm of the amplification at the level itself
_RANGE = 12.0  # and of the largest one between two orthonormalisations
_SQUARINGS = 5  # behind the bound on the largest eigenvalue: at most n^(1/64) above it, 1.11 for 768
_SKEW = 1e-9  # what products of rows that count as orthonormal may be off by
_MOST_POWER = 100  # of two, by which float32 rows are scaled
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
    asked = [i for i in which if (requests[i].level or 0.0) > _LEAST and requests[i].tol > 4 * _ROUNDING]
    size, found = max(1, _MOST_ELEMENTS // (W.shape[1] * W.shape[2])), dict[int, Found]()
    for start in range(0, len(asked), size):
        found |= _of_some(W, scale, requests, asked[start : start + size], seed)
    return found


def _of_some(W: Tensor, scale: Tensor, requests: list[Request], some: list[int], seed: int) -> dict[int, Found]:
    levels, tols = [requests[i].level or 0.0 for i in some], [requests[i].tol for i in some]
    part, its = (W, scale) if len(some) == len(W) else (W[some], scale[some])
    batch = _Batch(part, gram_of(part, its), its, levels, tols)
    rest = below(batch.G, [level * (1 + tol - _ROUNDING) for level, tol in zip(levels, tols, strict=True)])
    none, left = ([j for j, one in enumerate(rest) if one is empty] for empty in (True, False))
    tops = tops_of(batch.G[none]).tolist() if none else ()
    found = {some[j]: nothing(W[some[j]], top, requests[some[j]]) for j, top in zip(none, tops, strict=True)}
    for share in _SHARES if batch.G.shape[-1] >= _FILTER_FROM else ():
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
    tols: list[float]

    @property
    def edges(self) -> list[float]:
        """The largest eigenvalues that are damped."""
        return [_EDGE * level * level for level in self.levels]

    def of(self, which: list[int]) -> _Batch:
        """Some of it, or itself: a copy of all would cost as much as a product."""
        if len(which) == len(self.levels):
            return self
        numbers = ([column[i] for i in which] for column in self[3:])
        return _Batch(self.W[which], self.G[which], self.scale[which], *numbers)


def _filtered(batch: _Batch, share: int, seed: int) -> list[Found | None]:
    bounds = _bounds(batch.G)
    ritz = _ritz(batch.G, _block(batch, bounds.tolist(), batch.G.shape[-1] // share, seed))
    verdicts = [_verdict(ritz, i, level, batch) for i, level in enumerate(batch.levels)]
    proved = _proved(batch, bounds, ritz.rows, verdicts)
    triplets = _triplets(batch, ritz, max((verdict.k for verdict in verdicts if verdict), default=0))
    return [
        _one(triplets, ritz, i, verdict, tol) if verdict is not None and fine else None
        for i, (verdict, fine, tol) in enumerate(zip(verdicts, proved, batch.tols, strict=True))
    ]


def _bounds(G: Tensor) -> Tensor:
    """Of the largest eigenvalues, from above. With a trace of one these are at least ``1/n``: no power underflows."""
    power = G
    for _ in range(_SQUARINGS):
        power = torch.bmm(power, power)
    bounds: Tensor = torch.linalg.matrix_norm(power).pow(0.5**_SQUARINGS)
    return bounds


def _block(batch: _Batch, bounds: list[float], columns: int, seed: int) -> Tensor:
    """Rows ``(B, columns, n)`` that span what is above the levels, orthonormal."""
    steepest = max(_rate(bound / edge) for bound, edge in zip(bounds, batch.edges, strict=True))
    degree = max(2, math.floor(_RANGE / steepest))
    if degree * steepest <= _RANGE:
        rows = _filter(batch, degree, columns, seed, _apart)
        if _are_orthonormal(rows):
            return rows
    return _filter(batch, degree, columns, seed, lambda rows: orthonormal(rows.mT).mT)


def _filter(batch: _Batch, degree: int, columns: int, seed: int, apart: Callable[[Tensor], Tensor]) -> Tensor:
    G = batch.G
    generator = torch.Generator(G.device).manual_seed(seed)
    rows = apart(torch.randn(columns, G.shape[-1], generator=generator, dtype=G.dtype, device=G.device) @ G)
    mapped = G * (4 / G.new_tensor(batch.edges)[:, None, None])
    mapped.diagonal(dim1=-2, dim2=-1).sub_(2)
    for _ in range(math.ceil(_GROWTH / (degree * _rate(1 / _EDGE)))):
        rows = apart(_polynomial(mapped, rows, degree))
    return apart(rows)


def _apart(rows: Tensor) -> Tensor:
    """One Cholesky QR without a look at what becomes of it: orthonormal if done twice, where there is a factor."""
    L = torch.linalg.cholesky_ex(torch.bmm(rows, rows.mT)).L
    apart: Tensor = torch.linalg.solve_triangular(L, rows, upper=False)
    return apart


def _are_orthonormal(rows: Tensor) -> bool:
    skew = torch.bmm(rows, rows.mT)
    skew.diagonal(dim1=-2, dim2=-1).sub_(1)
    return float(skew.abs().max()) < _SKEW


def _rate(ratio: float) -> float:
    """By how much one degree amplifies an eigenvalue that is ``ratio`` times the edge, as a logarithm."""
    return math.acosh(max(2 * ratio - 1, 1 + 1e-12))


def _polynomial(mapped: Tensor, rows: Tensor, degree: int) -> Tensor:
    """``T_d(M / 2)`` of the rows, of unit length, for ``M = 4 G / a - 2 I``."""
    before, now = rows, torch.bmm(rows, mapped) / 2
    for _ in range(degree - 1):
        before, now = now, torch.baddbmm(before, now, mapped, beta=-1)
    unit: Tensor = now / torch.linalg.vector_norm(now, dim=-1, keepdim=True)
    return unit


def _ritz(G: Tensor, rows: Tensor) -> _Ritz:
    image = torch.bmm(rows, G)
    core = torch.bmm(image, rows.mT)
    values, Y = eigh((core + core.mT) / 2)
    values, Y = values.flip(-1), Y.flip(-1).mT
    rows, image = torch.bmm(Y, rows), torch.bmm(Y, image)
    lengths = torch.linalg.vector_norm(image - values[..., None] * rows, dim=-1)
    numbers = torch.stack([values, lengths]).tolist()
    return _Ritz(rows, numbers[0], numbers[1])


def _verdict(ritz: _Ritz, index: int, level: float, batch: _Batch) -> Verdict | None:
    """How many are taken, and what their residuals leave of the tolerance; ``None`` where that is too little."""
    S = [math.sqrt(max(value, 0.0)) for value in ritz.values[index]]
    k = sum(s > level for s in S)
    if k > len(S) - _ROOM:
        return None
    residuals = [length / s for length, s in zip(ritz.lengths[index][:k], S[:k], strict=True)]
    rounding = 4 * torch.finfo(batch.W.dtype).eps * math.sqrt(max(batch.W.shape[-2:]))
    leak = math.sqrt(sum(r * r for r in residuals)) + rounding + _ROUNDING
    return Verdict(k, S[k], math.nan, leak, True) if leak <= _LEAK * batch.tols[index] else None


def _proved(batch: _Batch, bounds: Tensor, rows: Tensor, verdicts: list[Verdict | None]) -> list[bool]:
    """Whether nothing was missed: the Cholesky factor of Note [Levels on a GPU]."""
    G, known = batch.G, [verdict or Verdict(0, 0.0, math.nan, math.inf, False) for verdict in verdicts]
    room = [
        level * (1 + max(0.0, tol - verdict.error))
        for level, tol, verdict in zip(batch.levels, batch.tols, known, strict=True)
    ]
    counts = torch.tensor([verdict.k for verdict in known], device=G.device)
    taken = torch.arange(rows.shape[-2], device=G.device) < counts[:, None]
    weights = 2 * bounds[:, None] * taken
    return below(torch.baddbmm(G, rows.mT, weights[..., None] * rows, alpha=-1), room)


def _triplets(batch: _Batch, ritz: _Ritz, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """``U, S, Vh`` of all, as many as the one with the most has."""
    W, Vh = batch.W, ritz.rows[:, :most].to(batch.W.dtype)
    wide = W.shape[-2] < W.shape[-1]
    # By a power of two, so that neither the products nor their squares leave the dtype, at the scale of any weight.
    size = torch.exp2(-batch.scale.double().log2().round().clamp(-_MOST_POWER, _MOST_POWER))
    product = (W.mT if wide else W) @ (Vh * size.to(W.dtype)[:, None, None]).mT
    length = torch.linalg.vector_norm(product, dim=-2)
    U, S = product / length[:, None, :], length / (batch.scale * size).to(W.dtype)[:, None]
    return (Vh.mT, S, U.mT) if wide else (U, S, Vh)


def _one(triplets: tuple[Tensor, Tensor, Tensor], ritz: _Ritz, index: int, leaked: Verdict, tol: float) -> Found:
    U, S, Vh = (part[index] for part in triplets)
    k, values = leaked.k, ritz.values[index]
    residual = [length / math.sqrt(value) for length, value in zip(ritz.lengths[index][:k], values[:k], strict=True)]
    verdict = Verdict(k, leaked.edge, math.nan, tol, True)
    return Found(U[:, :k], S[:k], Vh[:k], S.new_tensor(residual), math.sqrt(values[0]), verdict)
