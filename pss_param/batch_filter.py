# SPDX-License-Identifier: Apache-2.0
r"""The directions above an edge of many matrices at once, on a GPU.

# Note [Directions above edges]
The matrices may have any shapes, as long as their smaller sides are equal: what is done here is done with their Gram
matrices ``G (B, f, f)``. Where the edge lies in a dense bulk a thin iteration does not come to rest, and the whole
spectrum takes a GPU's library 8 ms for each matrix of 768 columns, one after the other. Products of a batch of Gram
matrices with thick blocks take a fraction of a millisecond for all. So

1. random blocks go through Chebyshev polynomials of ``G`` that are small on ``[0, a]`` and grow as fast as any above
   it. They are orthonormalised whenever the largest directions have outgrown those at the edge so far that a Cholesky
   factor could not tell them apart any more;
2. one Rayleigh-Ritz step makes triplets of them, and measures their residuals;
3. a Cholesky factor proves that nothing was missed: where

       A = x I - G + D V V^T,    D > 0,

   has one, no ``y`` orthogonal to ``V`` has ``|W y|^2 > x |y|^2``.

References:
    Zhou, Saad, Tiago and Chelikowsky, "Chebyshev-filtered subspace iteration", J. Comput. Phys. 219 (2006);
    Sylvester's law of inertia, Golub and Van Loan, "Matrix Computations", 8.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor

from pss_param.below import below, gram_of
from pss_param.blocks import orthonormal
from pss_param.certificate import Request, Verdict
from pss_param.eigen import eigh
from pss_param.found import Found

__all__ = [
    "EDGE", "FILTER_FROM", "LEAK", "ROUNDING", "Batch", "Ritz", "batches", "found", "grown", "proved", "random_rows",
    "ritz",
]  # fmt: skip

FILTER_FROM = 192  # columns; the whole spectrum of fewer takes less
EDGE = 0.8
"""Of the squared level, at which the polynomials begin to grow."""
LEAK = 0.8
"""The share of the tolerance that residuals may take; what they leave is for the proof."""
ROUNDING = 1e-5
"""The part of the tolerance that is kept for the rounding of a float32 weight's norm."""
_MOST_ELEMENTS = 1 << 24  # of W, and of Gram matrices, worked on at once in float64
_RANGE = 12.0  # logarithm of the largest amplification between two orthonormalisations
_SKEW = 1e-9  # what products of rows that count as orthonormal may be off by
_MOST_POWER = 100  # of two, by which float32 rows are scaled


class Batch(NamedTuple):
    """Matrices of one smaller side that are looked at together.

    Attributes:
        groups: those of one shape, ``(B_i, m_i, n_i)``.
        G: their Gram matrices over ``scale^2``, of all groups in turn, float64 ``(B, f, f)``.
        scale: ``||W||_F`` of each, not zero, ``(B,)``.
        requests: what is wanted of each.
    """

    groups: tuple[Tensor, ...]
    G: Tensor
    scale: Tensor
    requests: list[Request]

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Of each matrix."""
        return [W.dtype for W in self.groups for _ in W]

    @property
    def roundings(self) -> list[float]:
        """That of the products with each matrix, as in :attr:`pss_param.certificate.Spectrum.rounding`."""
        return [4 * torch.finfo(W.dtype).eps * math.sqrt(max(W.shape[1:])) for W in self.groups for _ in W]

    @property
    def matrices(self) -> list[Tensor]:
        """One after the other."""
        return [*chain(*self.groups)]

    def of(self, which: list[int]) -> Batch:
        """Some of it, or itself: a copy of all would cost as much as a product.

        Args:
            which: their places, ascending.

        Returns:
            The smaller batch.
        """
        if len(which) == len(self.requests):
            return self
        return Batch(_some(self.groups, which), self.G[which], self.scale[which], [self.requests[i] for i in which])


class Ritz(NamedTuple):
    """Ritz vectors as rows, descending.

    Attributes:
        rows: ``(B, b, f)``.
        S: singular values of each matrix.
        residual: ``||W^T u - s v||`` of each.
    """

    rows: Tensor
    S: list[list[float]]
    residual: list[list[float]]


def batches(
    groups: Sequence[Tensor], scale: Tensor, requests: list[Request], which: list[int]
) -> Iterator[tuple[list[int], Batch]]:
    """Form the Gram matrices, as many at once as memory allows.

    Args:
        groups: matrices by shape, ``(B_i, m_i, n_i)``.
        scale: ``||W||_F`` of all of them in turn.
        requests: what is wanted of each.
        which: the places that are to be looked at, ascending.

    Yields:
        Places, and what lies there.
    """
    for some in _pieces([group.shape[1:] for group in groups for _ in group], which):
        parts, its = _some(groups, some), scale[some]
        cut = torch.split(its, [len(part) for part in parts])
        G = torch.cat([gram_of(part, norms) for part, norms in zip(parts, cut, strict=True)])
        yield some, Batch(parts, G, its, [requests[i] for i in some])


def _pieces(shapes: list[torch.Size], which: list[int]) -> list[list[int]]:
    pieces: list[list[int]] = []
    room = 0
    for i in which:
        need = max(shapes[i].numel(), min(shapes[i]) ** 2)
        if need > room:
            pieces.append([])
            room = _MOST_ELEMENTS
        pieces[-1].append(i)
        room -= need
    return pieces


def _some(groups: Sequence[Tensor], which: list[int]) -> tuple[Tensor, ...]:
    starts = accumulate(map(len, groups), initial=0)
    chosen = [
        (group, [i - start for i in which if 0 <= i - start < len(group)])
        for group, start in zip(groups, starts, strict=False)
    ]
    # What lies side by side is not copied.
    return tuple(
        group[its[0] : its[-1] + 1] if its[-1] - its[0] < len(its) else group[its] for group, its in chosen if its
    )


def random_rows(G: Tensor, columns: int, seed: int) -> Tensor:
    """Gaussian rows times ``G``, the same for every matrix.

    Args:
        G: ``(B, f, f)``.
        columns: how many.
        seed: of a generator of its own.

    Returns:
        ``(B, columns, f)``.
    """
    generator = torch.Generator(G.device).manual_seed(seed)
    return torch.randn(columns, G.shape[-1], generator=generator, dtype=G.dtype, device=G.device) @ G


def grown(G: Tensor, rows: Tensor, edges: list[float], tops: list[float], growth: float) -> Tensor:
    """What polynomials make of rows: orthonormal, and nearer to what lies above the edges.

    Args:
        G: ``(B, f, f)``.
        rows: ``(B, b, f)``.
        edges: ``a`` of each matrix: eigenvalues below are damped.
        tops: near the largest eigenvalue of each.
        growth: logarithm of the amplification at ``a /`` :data:`EDGE`.

    Returns:
        Orthonormal rows ``(B, b, f)``.
    """
    steepest = max(_rate(top / edge) for top, edge in zip(tops, edges, strict=True))
    degree = max(2, math.floor(_RANGE / steepest))
    if degree * steepest <= _RANGE:
        fast = _grown(G, rows, edges, (degree, growth), _apart)
        if _are_orthonormal(fast):
            return fast
    return _grown(G, rows, edges, (degree, growth), lambda rows: orthonormal(rows.mT).mT)


def _grown(
    G: Tensor, rows: Tensor, edges: list[float], how: tuple[int, float], apart: Callable[[Tensor], Tensor]
) -> Tensor:
    degree, growth = how
    mapped = G * (4 / G.new_tensor(edges)[:, None, None])
    mapped.diagonal(dim1=-2, dim2=-1).sub_(2)
    rows = apart(rows)
    for _ in range(math.ceil(growth / (degree * _rate(1 / EDGE)))):
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


def ritz(G: Tensor, rows: Tensor) -> Ritz:
    """One Rayleigh-Ritz step; its residuals are measured, not bounded.

    Args:
        G: ``(B, f, f)``.
        rows: orthonormal, ``(B, b, f)``.

    Returns:
        Ritz vectors. ``||G v - s^2 v|| = s ||W^T u - s v||``.
    """
    image = torch.bmm(rows, G)
    core = torch.bmm(image, rows.mT)
    values, Y = eigh((core + core.mT) / 2)
    values, Y = values.flip(-1), Y.flip(-1).mT
    rows, image = torch.bmm(Y, rows), torch.bmm(Y, image)
    S = values.clamp_min(0).sqrt()
    lengths = torch.linalg.vector_norm(image - values[..., None] * rows, dim=-1)
    numbers = torch.stack([S, torch.where(S > 0, lengths / S, lengths.sqrt())]).tolist()
    return Ritz(rows, numbers[0], numbers[1])


def proved(G: Tensor, rows: Tensor, counts: Sequence[int], tops: list[float], ceilings: list[float]) -> list[bool]:
    """Whether nothing above the ceilings was missed: Note [Directions above edges].

    Args:
        G: ``(B, f, f)``.
        rows: Ritz vectors, ``(B, b, f)``.
        counts: how many of them are taken, by matrix.
        tops: near the largest eigenvalue of each.
        ceilings: singular values.

    Returns:
        The answers.
    """
    taken = torch.arange(rows.shape[-2], device=G.device) < torch.tensor(counts, device=G.device)[:, None]
    weights = 2 * G.new_tensor(tops)[:, None] * taken
    return below(torch.baddbmm(G, rows.mT, weights[..., None] * rows, alpha=-1), ceilings)


def found(batch: Batch, at: Ritz, verdicts: Sequence[Verdict | None]) -> list[Found | None]:
    """The results, with left directions from one more product.

    Args:
        batch: the matrices.
        at: their Ritz vectors.
        verdicts: of each; ``None`` where there is no result.

    Returns:
        One each.
    """
    results: list[Found | None] = []
    for W in batch.groups:
        here = slice(len(results), len(results) + len(W))
        most = max((verdict.k for verdict in verdicts[here] if verdict), default=0)
        U, S, Vh = _triplets(W, batch.scale[here], at.rows[here, :most])
        for i, verdict in enumerate(verdicts[here], here.start):
            triplet = (U[i - here.start], S[i - here.start], Vh[i - here.start])
            results.append(None if verdict is None else _one(triplet, at, i, verdict))
    return results


def _triplets(W: Tensor, scale: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``U, S, Vh`` of all, as many as the one with the most has."""
    Vh, wide = rows.to(W.dtype), W.shape[-2] < W.shape[-1]
    # By a power of two, so that neither the products nor their squares leave the dtype, at the scale of any weight.
    size = torch.exp2(-scale.double().log2().round().clamp(-_MOST_POWER, _MOST_POWER))
    product = (W.mT if wide else W) @ (Vh * size.to(W.dtype)[:, None, None]).mT
    length = torch.linalg.vector_norm(product, dim=-2).clamp_min(torch.finfo(W.dtype).tiny)
    U, S = product / length[:, None, :], length / (scale * size).to(W.dtype)[:, None]
    return (Vh.mT, S, U.mT) if wide else (U, S, Vh)


def _one(triplet: tuple[Tensor, Tensor, Tensor], at: Ritz, index: int, verdict: Verdict) -> Found:
    (U, S, Vh), k = triplet, verdict.k
    return Found(U[:, :k], S[:k], Vh[:k], S.new_tensor(at.residual[index][:k]), at.S[index][0], verdict)
