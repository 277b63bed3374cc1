# SPDX-License-Identifier: Apache-2.0
r"""Whether anything of a matrix lies above a level, told by a Cholesky factor.

# Note [Nothing above a level]
A trigger opens every weight, and many of them are where they were in health. Let

    A = x I - G,    G = W^T W / ||W||_F^2,    x = c^2 (1 + t)^2,

have a Cholesky factor. Then no singular value is above ``c (1 + t)``. At most ``1 / c^2`` of them are above ``c``,
since the sum of all squares is one, and a smoothing takes at most ``c t`` from each of these. So it takes at most ``t``
of the Frobenius norm from the whole matrix, and where that is within the tolerance, the matrix may stay as it is. A GPU
does this for a whole batch in a few milliseconds.

References:
    Sylvester's law of inertia, Golub and Van Loan, "Matrix Computations", 8.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pss_param.certificate import Request, Verdict
from pss_param.eigen import high_power
from pss_param.found import Found

__all__ = ["below", "gram_of", "nothing", "tops_of"]

_MOST_ELEMENTS = 1 << 24


def gram_of(W: Tensor, scale: Tensor) -> Tensor:
    """Gram matrices of the smaller side, in float64, of which only some rows at a time are held in it.

    Args:
        W: ``(B, m, n)``.
        scale: ``||W||_F`` of each, not zero.

    Returns:
        ``(B, f, f)`` with ``f = min(m, n)`` and a trace of one.
    """
    rows = W if W.shape[1] >= W.shape[2] else W.mT
    G = W.new_zeros(W.shape[0], rows.shape[2], rows.shape[2], dtype=torch.float64)
    for block in torch.split(rows, max(1, _MOST_ELEMENTS // (rows.shape[0] * rows.shape[2])), dim=1):
        wide = block.to(torch.float64, copy=True).div_(scale.double()[:, None, None])
        G.baddbmm_(wide.mT, wide)
    return G


def below(G: Tensor, levels: list[float]) -> list[bool]:
    """Whether all eigenvalues are below the squared levels: one host synchronisation.

    Args:
        G: symmetric, float64 ``(B, f, f)``.
        levels: one each.

    Returns:
        The answers; a matrix that touches its level within rounding counts as above.
    """
    A = -G
    A.diagonal(dim1=-2, dim2=-1).add_(torch.tensor(levels, dtype=G.dtype, device=G.device).square()[:, None])
    failed: list[int] = torch.linalg.cholesky_ex(A).info.tolist()
    return [info == 0 for info in failed]


def tops_of(G: Tensor) -> Tensor:
    """Largest singular values, by 256 steps of the power method at once; never above the true ones.

    Args:
        G: Gram matrices, float64 ``(B, f, f)``.

    Returns:
        ``(B,)``.
    """
    power, tiny = high_power(G)[0], torch.finfo(G.dtype).tiny
    best = power.diagonal(dim1=-2, dim2=-1).argmax(-1)
    x = power.gather(-1, best[:, None, None].expand(-1, G.shape[-1], 1))
    x = x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(tiny)
    tops: Tensor = torch.linalg.vecdot(x, G @ x, dim=1)[:, 0].clamp_min(0).sqrt()
    return tops


def nothing(W: Tensor, top: float, request: Request) -> Found:
    """The result for a matrix that may stay as it is.

    Args:
        W: ``(m, n)``.
        top: its largest singular value over its norm.
        request: what was wanted.

    Returns:
        No triplets, and a bound as large as the tolerance.
    """
    m, n = W.shape
    verdict = Verdict(0, top, math.nan, request.tol, True)
    return Found(W.new_zeros(m, 0), W.new_zeros(0), W.new_zeros(0, n), W.new_zeros(0), top, verdict)
