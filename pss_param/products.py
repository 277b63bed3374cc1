# SPDX-License-Identifier: Apache-2.0
r"""Products of a matrix with a thin block, by the kernel that its layout asks for.

# Note [Which kernel]
A BLAS takes the same product as one of four calls, by whether the block and the result are stored by rows or by
columns, and on a CPU they differ by up to ten. MKL, 2048 x 2048 times 8 columns, in ms with one thread and two:

    W X  1.55, 0.74;   X^T W^T  1.08, 0.83;   W^T Y  19.7, 9.9;   Y^T W  1.16, 0.88.

With the block on the left the kernel is a good one, but the threads hardly share it. So they get a panel of the matrix
each, as a batch of products: ``X^T W^T`` takes 0.53 and ``Y^T W`` 0.60. At 16 columns and more ``W X`` is shared well
(0.85; in panels the same), ``Y^T W`` is not (1.20; in panels 0.91); 4096 x 4096 times 16 columns 7.1 and 4.7, times 8
columns 6.0 and 3.5. Panels of a length that threads do not divide overlap by a few rows or columns. A matrix stored by
columns is the transpose of one stored by rows, so a strided view, such as the transpose of a wide weight, costs no more
than the weight itself. Results have their columns contiguous, or their rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pss_param.krylov import Matrix

FULL_WIDTH = 16
"""Columns of a register tile: from here on the threads share ``W X`` well, and blocks are multiples of it."""

_LARGE = 1 << 24
"""Elements from which a GPU was measured with the block on the right."""

_LEAST_PANEL = 64
"""Rows or columns of a matrix that are worth a thread."""

_LEAST_OVER_OVERLAP = 8  # of a panel, over what it shares with the next one

_MKL: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
"""Whether the products of a batch are shared by the threads: other libraries make one after the other."""


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
    return _along_the_rows(W, X, factor) if _by_rows(W) else _down_the_columns(W.mT, X, factor)


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
    return _down_the_columns(W, Y, factor) if _by_rows(W) else _along_the_rows(W.mT, Y, factor)


def from_the_left(rows: Tensor, W: Tensor, factor: float | Tensor = 1.0) -> Tensor:
    """``factor * rows @ W``, a panel of the matrix to each thread: Note [Which kernel].

    Args:
        rows: ``(..., b, m)``.
        W: ``(..., m, n)``.
        factor: a number, or ``(..., 1, 1)``.

    Returns:
        ``(..., b, n)``.

    Example:
        >>> from_the_left(torch.ones(1, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([[4., 6.]])
    """
    n, panels = W.shape[-1], _panels(W)
    if panels == 1 or isinstance(factor, Tensor):
        return _product(rows, W, factor)
    step = n // panels
    width = n - step * (panels - 1)
    parts = W.unfold(1, width, step).transpose(0, 1)
    found = torch.baddbmm(W.new_empty(1), rows.expand(panels, *rows.shape), parts, beta=0, alpha=factor)
    if width == step:
        return found.transpose(0, 1).reshape(rows.shape[0], n)
    return torch.cat([*found[:-1, :, :step], found[-1]], dim=1)


def _panels(W: Tensor) -> int:
    """As many as threads work on a matrix of a CPU; batches and GPUs divide their work well."""
    if not _is_shared(W):
        return 1
    columns = W.shape[1]
    panels = max(1, min(torch.get_num_threads(), columns // _LEAST_PANEL))
    while (columns % panels) * _LEAST_OVER_OVERLAP > columns // panels:
        panels -= 1
    return panels


def _is_shared(W: Tensor) -> bool:
    return _MKL and W.dim() == 2 and W.device.type == "cpu"


def _by_rows(W: Tensor) -> bool:
    return W.stride(-1) <= W.stride(-2)


def _along_the_rows(W: Tensor, X: Tensor, factor: float | Tensor) -> Tensor:
    """``W X`` of a matrix stored by rows."""
    thin = X.shape[-1] < FULL_WIDTH and _is_shared(W)
    return from_the_left(X.mT, W.mT, factor).mT if thin else _product(W, X, factor)


def _down_the_columns(W: Tensor, Y: Tensor, factor: float | Tensor) -> Tensor:
    """``W^T Y`` of a matrix stored by rows: the sum runs over the rows."""
    tall = W.numel() >= _LARGE or W.shape[-2] > W.shape[-1]
    if on_gpu(W) and tall and Y.shape[-1] >= FULL_WIDTH:
        return _product(W.mT, Y, factor)
    return from_the_left(Y.mT, W, factor).mT


def _product(A: Tensor, B: Tensor, factor: float | Tensor) -> Tensor:
    if isinstance(factor, Tensor) or A.dim() > 2:
        return (A @ B).mul_(factor)
    return torch.addmm(A.new_empty(1), A, B, beta=0, alpha=factor)  # the BLAS multiplies on the way
