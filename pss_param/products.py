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

Of large float32 matrices this is true where the CPU has no 512-bit registers, and of those with gaps between their
rows. The others are another library's: Note [Two libraries] in :mod:`pss_param.onednn`.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pss_param import onednn

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


class ThinProducts:
    """Products of ``factor * W`` with thin blocks, prepared once: a product of a small matrix takes little longer.

    Args:
        W: ``(..., m, n)``.
        factor: a number, or one for each matrix of a batch, ``(B, 1, 1)``.

    Example:
        >>> products = ThinProducts(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> products.times(torch.ones(2, 1)).mT, products.times_t(torch.ones(2, 1)).mT
        (tensor([[3., 7.]]), tensor([[4., 6.]]))
    """

    def __init__(self, W: Tensor | Matrix, factor: float | Tensor = 1.0) -> None:
        self._W, self._factor = W, factor
        self._by_rows = not isinstance(W, Tensor) or W.stride(-1) <= W.stride(-2)
        self._cut: dict[bool, Panels] = {}

    def times(self, X: Tensor) -> Tensor:
        """``factor * W @ X``.

        Args:
            X: ``(..., n, b)``, its columns contiguous.

        Returns:
            ``(..., m, b)``.
        """
        if not isinstance(self._W, Tensor):
            return (self._W @ X).mul_(self._factor)
        return self._along_the_rows(self._W, X) if self._by_rows else self._down_the_columns(self._W.mT, X)

    def times_t(self, Y: Tensor) -> Tensor:
        """``factor * W^T @ Y``.

        Args:
            Y: ``(..., m, b)``, its columns contiguous.

        Returns:
            ``(..., n, b)``.
        """
        if not isinstance(self._W, Tensor):
            return (Y.mT @ self._W).mul_(self._factor).mT
        return self._down_the_columns(self._W, Y) if self._by_rows else self._along_the_rows(self._W.mT, Y)

    def _along_the_rows(self, W: Tensor, X: Tensor) -> Tensor:
        """``W X`` of a matrix stored by rows."""
        columns = X.shape[-1]
        if onednn.serves(W, columns) or (columns < FULL_WIDTH and _is_shared(W)):
            return self._panels(W.mT, True).behind(X.mT, self._factor).mT
        return _product(W, X, self._factor)

    def _down_the_columns(self, W: Tensor, Y: Tensor) -> Tensor:
        """``W^T Y`` of a matrix stored by rows: the sum runs over the rows."""
        tall = W.numel() >= _LARGE or W.shape[-2] > W.shape[-1]
        if on_gpu(W) and tall and Y.shape[-1] >= FULL_WIDTH:
            return _product(W.mT, Y, self._factor)
        return self._panels(W, False).behind(Y.mT, self._factor).mT

    def _panels(self, W: Tensor, of_rows: bool) -> Panels:
        """Kept, since cutting takes a tenth of a product with a matrix of 512 x 512."""
        if of_rows not in self._cut:
            self._cut[of_rows] = Panels(W)
        return self._cut[of_rows]


class Panels:
    """A matrix for products with thin rows before it: by oneDNN, or cut into one panel for each thread.

    Args:
        W: ``(..., m, n)``; of batches, and where threads are not ours to share, one panel is all.

    Example:
        >>> Panels(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).behind(torch.ones(1, 2))
        tensor([[4., 6.]])
    """

    def __init__(self, W: Tensor) -> None:
        self._W = W

    def behind(self, rows: Tensor, factor: float | Tensor = 1.0) -> Tensor:
        """``factor * rows @ W``.

        Args:
            rows: ``(..., b, m)``.
            factor: a number, or one for each matrix of a batch, ``(B, 1, 1)``.

        Returns:
            ``(..., b, n)``, its rows contiguous.
        """
        if onednn.serves(self._W, rows.shape[-2]):
            return onednn.product(rows, self._W).mul_(factor)
        cut = self._cut
        if cut is None or isinstance(factor, Tensor):
            return _product(rows, self._W, factor)
        spread = rows.expand(cut.parts.shape[0], *rows.shape)
        found = torch.baddbmm(cut.unused, spread, cut.parts, beta=0, alpha=factor)
        if cut.even:
            return found.transpose(0, 1).reshape(rows.shape[0], self._W.shape[1])
        return torch.cat([*found[:-1, :, : cut.step], found[-1]], dim=1)

    @cached_property
    def _cut(self) -> _Cut | None:
        W, panels = self._W, _how_many(self._W)
        if panels == 1:
            return None
        step = W.shape[1] // panels
        width = W.shape[1] - step * (panels - 1)
        return _Cut(W.unfold(1, width, step).transpose(0, 1), step, width == step, W.new_empty(1))


class _Cut(NamedTuple):
    """Panels ``(p, m, width)``, each ``step`` columns behind the one before."""

    parts: Tensor
    step: int
    even: bool
    unused: Tensor


def _how_many(W: Tensor) -> int:
    """As many panels as threads work on a matrix of a CPU; batches and GPUs divide their work well."""
    if not _is_shared(W):
        return 1
    columns = W.shape[1]
    panels = max(1, min(torch.get_num_threads(), columns // _LEAST_PANEL))
    while (columns % panels) * _LEAST_OVER_OVERLAP > columns // panels:
        panels -= 1
    return panels


def _is_shared(W: Tensor) -> bool:
    return _MKL and W.dim() == 2 and W.device.type == "cpu"


def _product(A: Tensor, B: Tensor, factor: float | Tensor) -> Tensor:
    if isinstance(factor, Tensor) or A.dim() > 2:
        return (A @ B).mul_(factor)
    return torch.addmm(A.new_empty(1), A, B, beta=0, alpha=factor)  # the BLAS multiplies on the way
