# SPDX-License-Identifier: Apache-2.0
r"""Matrices of which nothing lies above their level, told from those that have something to find.

# Note [Nothing above a level]
A trigger opens every weight, and most of them are where they were in health. To find that out on a GPU by their whole
spectra takes 9 ms for each of 768 x 768; a Cholesky factor of a batch of them takes as long for all. Let

    A = x I - G,    G = W^T W / ||W||_F^2,    x = c^2 (1 + t)^2,

have one. Then no singular value is above ``c (1 + t)``. At most ``1 / c^2`` of them are above ``c``, since the sum of
all squares is one, and a smoothing takes at most ``c t`` from each of these. So it takes at most ``t`` of the
Frobenius norm from the whole matrix, and where that is within the tolerance, the matrix may stay as it is.

On a CPU, where one core does the work of a thin iteration in the same time, nothing asks this.

References:
    Sylvester's law of inertia, Golub and Van Loan, "Matrix Computations", 8.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pss_param.certificate import Request, Verdict
from pss_param.found import Found

__all__ = ["nothing_above"]

_SQUARINGS = 8
_ROUNDING = 1e-5
"""The part of the tolerance that is kept for the rounding of a float32 weight's norm."""
_MOST_ELEMENTS = 1 << 24  # of W, worked on at once in float64: the peak is some ten times their bytes in float32


def nothing_above(W: Tensor, scale: Tensor, requests: list[Request], which: list[int]) -> dict[int, Found]:
    """Empty results for those matrices that have nothing above their level but for the tolerance.

    Args:
        W: ``(B, m, n)``.
        scale: ``||W||_F`` of each, not zero.
        requests: what is wanted of each; only levels are looked at.
        which: the matrices to look at.

    Returns:
        By place in the batch: Note [Nothing above a level].
    """
    asked = [i for i in which if (requests[i].level or 0.0) > 0 and requests[i].tol > 2 * _ROUNDING]
    size, found = max(1, _MOST_ELEMENTS // (W.shape[1] * W.shape[2])), dict[int, Found]()
    for start in range(0, len(asked), size):
        some = asked[start : start + size]
        G = _gram(W if len(some) == W.shape[0] else W[some], scale[some])
        room = [(requests[i].level or 0.0) * (1 + requests[i].tol - _ROUNDING) for i in some]
        below, tops = _below(G, torch.tensor(room, dtype=G.dtype, device=G.device).square()), _tops(G).tolist()
        found |= {i: _empty(W[i], top, requests[i]) for i, top, fine in zip(some, tops, below, strict=True) if fine}
    return found


def _gram(W: Tensor, scale: Tensor) -> Tensor:
    """Of the smaller side, in float64."""
    wide = W.to(torch.float64, copy=True).div_(scale.double()[:, None, None])
    return wide.mT @ wide if W.shape[1] >= W.shape[2] else wide @ wide.mT


def _below(G: Tensor, x: Tensor) -> list[bool]:
    A = -G
    A.diagonal(dim1=-2, dim2=-1).add_(x[:, None])
    failed: list[int] = torch.linalg.cholesky_ex(A).info.tolist()
    return [info == 0 for info in failed]


def _tops(G: Tensor) -> Tensor:
    """Largest singular values, by the power method with ``G^256`` at once; never above the true ones."""
    power = G
    for _ in range(_SQUARINGS):
        power = power @ power
        power = power / torch.linalg.matrix_norm(power).clamp_min(torch.finfo(G.dtype).tiny)[:, None, None]
    best = power.diagonal(dim1=-2, dim2=-1).argmax(-1)
    x = power.gather(-1, best[:, None, None].expand(-1, G.shape[-1], 1))
    x = x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(torch.finfo(G.dtype).tiny)
    tops: Tensor = torch.linalg.vecdot(x, G @ x, dim=1)[:, 0].clamp_min(0).sqrt()
    return tops


def _empty(W: Tensor, top: float, request: Request) -> Found:
    m, n = W.shape
    verdict = Verdict(0, top, math.nan, request.tol, True)
    return Found(W.new_zeros(m, 0), W.new_zeros(0), W.new_zeros(0, n), W.new_zeros(0), top, verdict)
