# SPDX-License-Identifier: Apache-2.0
r"""Products of a matrix with a thin block, by the kernel that its layout asks for.

# Note [Which kernel]
A BLAS takes the same product as one of four calls, by whether the block and the result are stored by rows or by
columns, and on a CPU they differ by up to ten: with MKL and two threads, 2048 x 2048 times 8 columns takes

    W X 2.6 ms, with the columns of X contiguous 1.4;   W^T Y 9.7 ms, as (Y^T W)^T 1.4;

times 16 columns 1.1 and 2.4, and 768 x 3072 times 8 columns 1.5 against 0.7 and 3.8 against 0.6. Two rules are near
the best of the four everywhere that was measured (256 x 256 to 4096 x 11008, 8 to 64 columns): blocks keep their
*columns* contiguous; and where the sum runs down the columns of a matrix stored by rows, the block goes to the left,
unless it is at least 16 wide and the matrix is tall, or larger than a cache (4096 x 4096 times 16 columns: 11.3 ms from
the left, 8.6 from the right; with one thread 12.9 and 25.7). A matrix stored by columns is the transpose of one stored
by rows. So a strided view, such as the transpose of a wide weight, costs no more than the weight itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pss_param.krylov import Matrix

FULL_WIDTH = 16
"""Columns that a pass down the rows carries at no more time than half as many, as wide as a register tile."""

_BEYOND_CACHE = 1 << 24
"""Elements of a matrix from which threads share the products from the right better than those from the left."""


def on_gpu(W: Tensor) -> bool:
    """Whether kernels of a GPU work on a tensor, where other algorithms pay than on a CPU.

    Args:
        W: any tensor.

    Returns:
        The answer.
    """
    return W.is_cuda


def times(W: Tensor | Matrix, X: Tensor, factor: float | Tensor = 1.0) -> Tensor:
    """``factor * W @ X``.

    Args:
        W: ``(..., m, n)``.
        X: ``(..., n, b)``, its columns contiguous.
        factor: a number, or ``(..., 1, 1)``.

    Returns:
        ``(..., m, b)``.
    """
    if not isinstance(W, Tensor):
        return (W @ X).mul_(factor)
    return _product(W, X, factor) if _by_rows(W) else _down_the_columns(W.mT, X, factor)


def times_t(W: Tensor | Matrix, Y: Tensor, factor: float | Tensor = 1.0) -> Tensor:
    """``factor * W^T @ Y``.

    Args:
        W: ``(..., m, n)``.
        Y: ``(..., m, b)``, its columns contiguous.
        factor: a number, or ``(..., 1, 1)``.

    Returns:
        ``(..., n, b)``.
    """
    if not isinstance(W, Tensor):
        return (Y.mT @ W).mul_(factor).mT
    return _down_the_columns(W, Y, factor) if _by_rows(W) else _product(W.mT, Y, factor)


def _by_rows(W: Tensor) -> bool:
    return W.stride(-1) <= W.stride(-2)


def _product(A: Tensor, B: Tensor, factor: float | Tensor) -> Tensor:
    if isinstance(factor, Tensor) or A.dim() > 2:
        return (A @ B).mul_(factor)
    return torch.addmm(A.new_empty(1), A, B, beta=0, alpha=factor)  # the BLAS multiplies on the way


def _down_the_columns(W: Tensor, Y: Tensor, factor: float | Tensor) -> Tensor:
    """``W^T Y`` of a matrix stored by rows: the sum runs over the rows."""
    large = W.numel() >= _BEYOND_CACHE and torch.get_num_threads() > 1
    if Y.shape[-1] >= FULL_WIDTH and (large or W.shape[-2] > W.shape[-1]):
        return _product(W.mT, Y, factor)
    return _product(Y.mT, W, factor).mT
