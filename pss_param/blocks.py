# SPDX-License-Identifier: Apache-2.0
r"""Orthonormal columns for thin blocks.

# Note [Blocks]
Blocks are orthonormalised by their Gram matrix and its Cholesky factor, in products that run at full speed where
Householder's reflections do not. The Gram matrix of float32 columns is formed in float64, where its squares keep what
the columns held. What one round leaves is the rounding of float64, amplified by the square of how dependent the columns
were, and that of the product with the inverse of the factor, amplified by how dependent they were. Of that the diagonal
of the factor tells: where its least element, over the length of its column, is above 0.2 (float64 columns: 0.03), the
columns are orthonormal at once; above 1e-3 those of float32 are if that product is one of float64; below it a second
round makes them so, and where it falls below 1e-6, or there is no factor, Householder's reflections do it after all.

References:
    Yamamoto et al., "CholeskyQR2", ETNA 44 (2015).
"""

from __future__ import annotations

import math
import operator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

INDEPENDENT = 0.03
_APART_IN_FLOAT32, _INDEPENDENT_IN_FLOAT32 = 0.2, 1e-3
_SAFE_FALL = 1e-6


class Factor(NamedTuple):
    """Of a block ``T = Q R`` with orthonormal ``Q = T R^-1``.

    Attributes:
        back: ``R^-T``, float64 ``(..., b, b)``.
        fall: least diagonal element of the factor of unit columns in the batch; not above zero where there is none.
        spoilt: bound on what the rounding of the columns may have become in ``Q``; infinite without a factor.
    """

    back: Tensor
    fall: float
    spoilt: float

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


def factor(squares: Tensor, noise: Any = None) -> Factor:
    """The triangular factor of a block from its Gram matrix: one host synchronisation.

    Args:
        squares: ``T^T T``, float64 ``(..., b, b)``.
        noise: squares of the rounding of each column, an array or a tensor ``(B, b)``.

    Returns:
        The factor; useless where ``fall`` is not above zero.
    """
    L, info = torch.linalg.cholesky_ex(squares)
    back: Tensor = torch.linalg.solve_triangular(L, identity(L.shape[-1], L.device), upper=False)
    if L.dim() == 2 and not L.is_cuda:
        if int(info):
            return Factor(back, 0.0, math.inf)
        heights, lengths = (each.numpy().diagonal().tolist() for each in (L, squares))
        fall = min(map(operator.truediv, heights, map(math.sqrt, lengths)))
        share = 0.0 if noise is None else max(map(operator.truediv, noise[0].tolist(), lengths))
        return Factor(back, fall, _spoilt(share, fall))
    heights, lengths = L.diagonal(dim1=-2, dim2=-1), squares.diagonal(dim1=-2, dim2=-1)
    falls = torch.where(info == 0, (heights / lengths.sqrt()).amin(-1), 0.0)
    shares = torch.zeros_like(lengths) if noise is None else torch.as_tensor(noise, device=L.device) / lengths
    fall, share = torch.stack([falls.min(), shares.max()]).tolist()  # only what counts leaves the device
    return Factor(back, fall if fall > 0 else 0.0, _spoilt(share, fall))


def _spoilt(share: float, fall: float) -> float:
    return math.sqrt(share) / fall if fall > 0 and share >= 0 else math.inf


@lru_cache(maxsize=8)
def identity(columns: int, device: torch.device) -> Tensor:
    """The float64 identity, made once; nobody writes to it.

    Args:
        columns: of it.
        device: where.

    Returns:
        ``(columns, columns)``.
    """
    return torch.eye(columns, dtype=torch.float64, device=device)


def orthonormal(block: Tensor, squares: Tensor | None = None) -> Tensor:
    """Orthonormal columns with the span of a thin block: Note [Blocks].

    Args:
        block: ``(..., m, b)``.
        squares: ``gram(block)``, where it is known already.

    Returns:
        ``(..., m, b)``, columns contiguous; columns that are not independent are completed.
    """
    for _ in range(2):
        found = factor(gram(block) if squares is None else squares)
        if not found.fall > _SAFE_FALL:
            reflected: Tensor = torch.linalg.qr(block).Q
            return reflected.mT.contiguous().mT
        if found.fall > (INDEPENDENT if block.dtype == torch.float64 else _APART_IN_FLOAT32):
            return found.columns(block)
        block = found.columns(block.double()).to(block.dtype)
        if found.fall > _INDEPENDENT_IN_FLOAT32 and block.dtype != torch.float64:
            break
        squares = None
    return block
