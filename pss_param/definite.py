# SPDX-License-Identifier: Apache-2.0
r"""Whether a symmetric matrix has a Cholesky factor.

# Note [A factor by panels]
A factor takes ``n^3 / 3`` operations, and LAPACK's own runs at a third of the speed of a matrix product on two threads
of a CPU. By panels of 128 rows, all else being products, it takes 0.5 to 0.6 of that time (512 to 4096) by oneDNN,
and 0.6 to 0.8 by MKL.

References:
    Golub and Van Loan, "Matrix Computations", 4.2.9.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pss_param.onednn import product
from pss_param.products import on_gpu

__all__ = ["SMALL", "positive_definite"]

SMALL = 384
"""Rows up to which one panel is as fast as several, and a factor costs no more than a few thin products."""

_PANEL = 128


def positive_definite(A: Tensor) -> bool:
    """Whether all eigenvalues are above zero: Note [A factor by panels].

    Args:
        A: ``(n, n)``, of which the upper triangle counts; what it holds is lost.

    Returns:
        The answer, within rounding.

    Example:
        >>> positive_definite(torch.eye(3)), positive_definite(-torch.eye(3))
        (True, False)
    """
    n = A.shape[0]
    panel = n if on_gpu(A) or n <= SMALL else _PANEL
    for start in range(0, n, panel):
        end = start + panel
        U, info = torch.linalg.cholesky_ex(A[start:end, start:end], upper=True)
        if int(info):
            return False
        if end < n:
            _eliminate(U, A[start:end, end:], A[end:, end:])
    return True


def _eliminate(U: Tensor, beside: Tensor, rest: Tensor) -> None:
    """Take out of the upper triangle of the rest, in place, what a panel has of it."""
    right = torch.linalg.solve_triangular(U.mT, beside, upper=False).mT.contiguous()
    for start in range(0, right.shape[0], 2 * _PANEL):
        end = start + 2 * _PANEL
        rest[start:end, start:].sub_(product(right[start:end], right[start:].mT))
