# SPDX-License-Identifier: Apache-2.0
r"""Orthonormal columns for thin blocks.

# Note [Blocks]
Blocks are orthonormalised by their Gram matrix and its Cholesky factor, in products that run at full speed where
Householder's reflections do not. The Gram matrix of float32 columns is formed in float64, where its squares keep what
the columns held. What one round leaves is the rounding of the product, amplified by how dependent the columns were, of
which the diagonal of the factor tells: where its least element, over the length of its column, is above 0.03, the
columns are orthonormal to some 1e-6 at once; below it a second round makes them so, and where it falls below 1e-6, or
there is no factor, Householder's reflections do it after all.

References:
    Yamamoto et al., "CholeskyQR2", ETNA 44 (2015).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

INDEPENDENT = 0.03
_SAFE_FALL = 1e-6


class Factor(NamedTuple):
    """Of a block ``T = Q R`` with orthonormal ``Q = T R^-1``.

    Attributes:
        R: float64 ``(..., b, b)``, upper triangular.
        back: ``R^-T``, float64 ``(..., b, b)``.
        fall: least diagonal element of the factor of unit columns in the batch; not above zero where there is none.
    """

    R: Tensor
    back: Tensor
    fall: float

    def columns(self, block: Tensor) -> Tensor:
        """``Q``, its columns contiguous.

        Args:
            block: ``T (..., m, b)``.

        Returns:
            ``(..., m, b)``.
        """
        return (self.back.to(block.dtype) @ block.mT).mT


def gram(block: Tensor) -> Tensor:
    """``T^T T`` in float64.

    Args:
        block: ``T (..., m, b)``.

    Returns:
        ``(..., b, b)``.
    """
    wide = block.double()
    return wide.mT @ wide


def factor(squares: Tensor, noise: float = 0.0) -> Factor:
    """The triangular factor of a block from its Gram matrix: one host synchronisation.

    Args:
        squares: ``T^T T``, float64 ``(..., b, b)``.
        noise: norm up to which a column may be nothing but rounding; then there is no factor.

    Returns:
        The factor; useless where ``fall`` is not above zero.
    """
    L, info = torch.linalg.cholesky_ex(squares)
    identity = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    back = torch.linalg.solve_triangular(L, identity, upper=False)
    diagonals = torch.stack([L, squares]).diagonal(dim1=-2, dim2=-1).reshape(2, -1)
    if L.dim() > 2:  # of many matrices only what counts leaves the device
        least = (diagonals[0] / diagonals[1].sqrt()).min()
        fall, shortest, failed = torch.stack([least, diagonals[1].min(), info.sum().double()]).tolist()
        return Factor(L.mT, back, fall if not failed and shortest > noise * noise else 0.0)
    heights, lengths = diagonals.tolist()
    if bool(info.any()) or not min(lengths) > noise * noise:
        return Factor(L.mT, back, 0.0)
    return Factor(L.mT, back, min(h / math.sqrt(square) for h, square in zip(heights, lengths, strict=True)))


def orthonormal(block: Tensor) -> Tensor:
    """Orthonormal columns with the span of a thin block: Note [Blocks].

    Args:
        block: ``(..., m, b)``.

    Returns:
        ``(..., m, b)``, columns contiguous; columns that are not independent are completed.
    """
    for _ in range(2):
        found = factor(gram(block))
        if not found.fall > _SAFE_FALL:
            reflected: Tensor = torch.linalg.qr(block).Q
            return reflected.mT.contiguous().mT
        block = found.columns(block)
        if found.fall > INDEPENDENT:
            break
    return block
