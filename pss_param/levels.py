# SPDX-License-Identifier: Apache-2.0
r"""What lies above a level, for many matrices at once on a GPU.

# Note [Levels on a GPU]
What has nothing above its level is told by a Cholesky factor: :mod:`pss_param.below`. For the rest a filter finds ``k``
triplets above ``c`` (Note [Directions above edges] in :mod:`pss_param.batch_filter`), with residuals ``R``, and proves
that no value of what is left of the matrix, ``(I - U U^T) W (I - V V^T)``, is above ``c (1 + t)``, so that a smoothing
takes at most ``t`` of the Frobenius norm from it (Note [Nothing above a level]): ``error <= ||R||_F + t + rounding``.

What has too many values above its level, or no proof, is left to the whole spectrum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pss_param.batch_filter import (
    EDGE,
    FILTER_FROM,
    LEAK,
    ROUNDING,
    Batch,
    Ritz,
    batches,
    found,
    grown,
    proved,
    random_rows,
    ritz,
)
from pss_param.below import below, nothing, tops_of
from pss_param.certificate import Request, Verdict
from pss_param.found import Found

__all__ = ["above_levels"]

_LEAST = 1e-12  # of a level over the norm, whose square is one part in float64
_SHARES = (8, 4)  # of the columns that a block may be wide: one after the other, while there is more above the level
_ROOM = 8  # columns that have to be left below the level
_GROWTH = 16.0  # logarithm of the amplification at the level itself
_SQUARINGS = 5  # behind the bound on the largest eigenvalue: at most n^(1/64) above it, 1.11 for 768


def above_levels(
    groups: Sequence[Tensor], scale: Tensor, requests: list[Request], which: list[int], seed: int
) -> dict[int, Found]:
    """Triplets above a level, by Note [Levels on a GPU].

    Args:
        groups: matrices of one smaller side, by shape: ``(B_i, m_i, n_i)``.
        scale: ``||W||_F`` of all of them in turn, not zero.
        requests: what is wanted of each; only levels are looked at.
        which: the matrices to look at, ascending.
        seed: of random columns.

    Returns:
        By place; what is not here is left to the whole spectrum.
    """
    asked = [i for i in which if (requests[i].level or 0.0) > _LEAST and requests[i].tol > 4 * ROUNDING]
    results = dict[int, Found]()
    for some, batch in batches(groups, scale, requests, asked):
        results |= {some[j]: one for j, one in _of_batch(batch, seed).items()}
    return results


def _of_batch(batch: Batch, seed: int) -> dict[int, Found]:
    rest = below(batch.G, [_level(request) * (1 + request.tol - ROUNDING) for request in batch.requests])
    none, left = ([j for j, one in enumerate(rest) if one is empty] for empty in (True, False))
    tops, matrices = tops_of(batch.G[none]).tolist() if none else (), batch.matrices
    results = {j: nothing(matrices[j], top, batch.requests[j]) for j, top in zip(none, tops, strict=True)}
    for share in _SHARES if batch.G.shape[-1] >= FILTER_FROM else ():
        if left:
            triplets = dict(zip(left, _filtered(batch.of(left), batch.G.shape[-1] // share, seed), strict=True))
            results |= {j: one for j, one in triplets.items() if one is not None}
            left = [j for j, one in triplets.items() if one is None]
    return results


def _level(request: Request) -> float:
    return request.level or 0.0


def _filtered(batch: Batch, columns: int, seed: int) -> list[Found | None]:
    tops, edges = _bounds(batch.G).tolist(), [EDGE * _level(request) ** 2 for request in batch.requests]
    at = ritz(batch.G, grown(batch.G, random_rows(batch.G, columns, seed), edges, tops, _GROWTH))
    verdicts = [_verdict(at, i, batch) for i in range(len(tops))]
    counts, leaks = zip(*((one.k, one.error) if one else (0, math.inf) for one in verdicts), strict=True)
    rooms = [_level(one) * (1 + max(0.0, one.tol - leak)) for one, leak in zip(batch.requests, leaks, strict=True)]
    fine = proved(batch.G, at.rows, counts, tops, rooms)
    return found(batch, at, [
        replace(verdict, error=request.tol) if verdict and yes else None
        for verdict, request, yes in zip(verdicts, batch.requests, fine, strict=True)
    ])  # fmt: skip


def _bounds(G: Tensor) -> Tensor:
    """Of the largest eigenvalues, from above. With a trace of one these are at least ``1/n``: no power underflows."""
    power = G
    for _ in range(_SQUARINGS):
        power = torch.bmm(power, power)
    bounds: Tensor = torch.linalg.matrix_norm(power).pow(0.5**_SQUARINGS)
    return bounds


def _verdict(at: Ritz, index: int, batch: Batch) -> Verdict | None:
    """How many are taken, and what their residuals leave of the tolerance; ``None`` where that is too little."""
    request, S = batch.requests[index], at.S[index]
    k = sum(s > _level(request) for s in S)
    leak = math.hypot(*at.residual[index][:k]) + batch.roundings[index] + ROUNDING
    return Verdict(k, S[k], math.nan, leak, True) if k <= len(S) - _ROOM and leak <= LEAK * request.tol else None
