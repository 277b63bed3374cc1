# SPDX-License-Identifier: Apache-2.0
r"""The dominant values, or a number of them, of many matrices at once on a GPU.

# Note [Counts on a GPU]
How many are wanted is told by the largest value, which powers of the Gram matrix give; where the edge lies is not, and
a filter has to know. So a block of half as many columns again goes through two passes and a short filter, after which
its Ritz values are within a few hundredths of the true ones (at worst 0.97 of them, in families of spectra from ``exp``
to Gaussian matrices with spikes); the filter to that edge makes the triplets: Note [Directions above edges] in
:mod:`pss_param.batch_filter`. The bound is that of Note [Nothing was missed] in :mod:`pss_param.filtered`.

Matrices that want blocks of like widths go together, so that one flat matrix does not make all others wide. What wants
more than a half of its columns, or finds no proof, is left to the whole spectrum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from pss_param.batch_filter import (
    EDGE,
    FILTER_FROM,
    LEAK,
    Batch,
    Ritz,
    batches,
    found,
    grown,
    proved,
    random_rows,
    ritz,
)
from pss_param.below import tops_of
from pss_param.blocks import orthonormal
from pss_param.certificate import Request, Spectrum, Verdict, by_count, count_of, rank_wanted
from pss_param.eigen import bound_by_powers, eigvalsh
from pss_param.filtered import COARSE, width_for
from pss_param.found import Found

__all__ = ["leading"]

_NARROW = 32  # columns of which a GPU solves many eigenproblems in one kernel
_SHARES = (8, 4, 2)  # of the columns that blocks may fill which go together
_FIRST_GROWTH = 4.0  # of the filter whose Ritz values say where the edge lies
_GROWTH = 9.0  # of the second one, beyond the inverse of the tolerance
_LEAST = 1e-10  # of an edge over the largest eigenvalue
_UNEVEN = 1e4  # values below so many eps S[0] have left directions that are off by more than 1e-4


def leading(
    groups: Sequence[Tensor], scale: Tensor, requests: list[Request], which: list[int], seed: int
) -> dict[int, Found]:
    """Dominant triplets, by Note [Counts on a GPU].

    Args:
        groups: matrices of one smaller side, by shape: ``(B_i, m_i, n_i)``.
        scale: ``||W||_F`` of all of them in turn, not zero.
        requests: what is wanted of each; only ranks and ``floor(SR)`` are looked at.
        which: the matrices to look at, ascending.
        seed: of random columns.

    Returns:
        By place; what is not here is left to the whole spectrum.
    """
    f = min(groups[0].shape[1:])
    asked = [i for i in which if by_count([requests[i]]) and requests[i].rank != 0]
    results = dict[int, Found]()
    for some, batch in batches(groups, scale, requests, asked if f >= FILTER_FROM else []):
        tops = tops_of(batch.G).tolist()  # zero for a matrix of zeros, which has nothing to find
        widths = [width_for(rank_wanted(*pair)) if pair[0] else 0 for pair in zip(tops, batch.requests, strict=True)]
        for these in _alike(widths, f):
            triplets = _filtered(batch.of(these), [tops[j] for j in these], seed)
            results |= {some[j]: one for j, one in zip(these, triplets, strict=True) if one is not None}
    return results


def _alike(widths: list[int], f: int) -> list[list[int]]:
    """Places of matrices whose blocks go together."""
    steps = [0, *sorted({_NARROW, *(f // share for share in _SHARES)})]
    classes = ([j for j, width in enumerate(widths) if low < width <= high] for low, high in pairwise(steps))
    return [places for places in classes if places]


def _filtered(batch: Batch, tops: list[float], seed: int) -> list[Found | None]:
    squares = [top * top for top in tops]
    at = ritz(batch.G, _rows(batch, squares, seed))
    judged = [_judged(at, i, batch) for i in range(len(tops))]
    counts, rooms = ([one[0].k for one in judged if one], [one[1] for one in judged if one])
    sure = [i for i, one in enumerate(judged) if one]
    fine = dict(zip(sure, proved(batch.G[sure], at.rows[sure], counts, [squares[i] for i in sure], rooms), strict=True))
    return found(batch, at, [one[0] if one and fine[i] else None for i, one in enumerate(judged)])


def _rows(batch: Batch, squares: list[float], seed: int) -> Tensor:
    """Orthonormal rows that span what is dominant."""
    G = batch.G
    ranks = [rank_wanted(math.sqrt(top), request) for top, request in zip(squares, batch.requests, strict=True)]
    rows = orthonormal(random_rows(G, max(map(width_for, ranks)), seed).mT)
    rows = orthonormal(G @ rows).mT
    least = 1 / bound_by_powers(torch.linalg.inv_ex(_core(G, rows)).inverse)
    rows = grown(G, rows, _edges(least.tolist(), squares), squares, _FIRST_GROWTH)
    values = eigvalsh(_core(G, rows)).flip(-1).tolist()
    levels = [EDGE * those[k] for those, k in zip(values, ranks, strict=True)]
    growth = _GROWTH - math.log(min(request.tol for request in batch.requests))
    return grown(G, rows, _edges(levels, squares), squares, growth)


def _core(G: Tensor, rows: Tensor) -> Tensor:
    core = torch.bmm(torch.bmm(rows, G), rows.mT)
    return (core + core.mT) / 2


def _edges(found: list[float], squares: list[float]) -> list[float]:
    """Levels that are above nothing but rounding, whatever a matrix of low rank gives."""
    return [max(edge, _LEAST * top) if edge < top else top / 2 for edge, top in zip(found, squares, strict=True)]


def _judged(at: Ritz, index: int, batch: Batch) -> tuple[Verdict, float] | None:
    """What is found, and the level above which nothing more may be; ``None`` where the residuals are too large."""
    S, residual, request, f = at.S[index], at.residual[index], batch.requests[index], batch.G.shape[-1]
    k, decided = count_of(Spectrum(S, residual, (f, f), False, 0.0), request.rank)
    leak = math.hypot(*residual[:k]) + batch.roundings[index]
    if not decided or k >= len(S) or leak > LEAK * request.tol or S[k] <= _least_value(batch, index) * S[0]:
        return None
    moved = 0.999 * (request.tol - leak)
    x = (S[k] + moved / (2 * math.sqrt(k))) ** 2 - 8 * torch.finfo(batch.G.dtype).eps * S[0] ** 2
    return (Verdict(k, S[k], math.nan, leak + moved, True), math.sqrt(x)) if x > S[k] ** 2 else None


def _least_value(batch: Batch, index: int) -> float:
    """What keeps its digits in squares, and its left direction in a product in the dtype of the matrix."""
    square, product = batch.G.dtype, batch.dtypes[index]
    return max(COARSE * math.sqrt(torch.finfo(square).eps), _UNEVEN * torch.finfo(product).eps)
