# SPDX-License-Identifier: Apache-2.0
r"""Adaptive randomized block Krylov iteration for the top of a spectrum: the engine of :mod:`pss_param.spectrum`.

Notation: ``W (B, m, n)`` with ``n <= m`` (the caller transposes), ``V (B, n, r)`` an orthonormal basis, ``P = W V``.

1. A Gaussian sketch, ``V = orth(W^T Omega)``; every pass over ``W`` is one matrix product with a thin block.
2. Rayleigh-Ritz on ``V``: the eigenpairs of ``P^T P`` give ``s``, ``v = V y`` and ``u = P y / s``, so that ``W v = s
   u`` holds
   to rounding and the whole error is in ``W^T u - s v``.
3. ``Z = W^T P_last``. In a Krylov basis ``W^T P`` leaves the span of ``V`` only through its last block, so the
   residual of every
   triplet is ``||(I - V V^T) Z y_last|| / s``: the pass that measures the error is the pass that enlarges the basis.
4. A *rule* looks at values and residuals and says: enough, go on, or go on with a wider block.

# Note [Width of the block]
A Krylov space sees each repeated singular value at most as often as the start has random columns. So the number of
random columns is kept above the number of wanted values (Musco and Musco 2015 prove convergence independent of gaps
for that width): when the rule learns that more values are wanted, fresh Gaussian columns join the next block.

# Note [Orthonormalisation by Gram matrices]
A QR of a tall thin block runs far below matrix-product speed. Two rounds of the eigenvalue form of Cholesky QR (SVQB:
Stathopoulos and Wu 2002) run at that speed and are as orthogonal; directions lost to rounding become zero columns,
which contribute zero Ritz values and so need no special case, even in a batch of matrices of different ranks.

References:
    Halko, Martinsson and Tropp, SIAM Review 53 (2011); Musco and Musco, NeurIPS 2015; Stathopoulos and Wu, SISC 23
    (2002).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ritz:
    """What the basis knows: triplets in descending order of ``S`` with residuals, all scaled to ``||W||_F`` about
    1.
    """

    S: Tensor  # (B, r)
    residual: Tensor  # (B, r): ||W^T u - s v||
    coordinates: Tensor  # (B, r, r): v = V @ coordinates


class Krylov:
    """A growing basis for one batch of matrices; see the module docstring for the algorithm."""

    def __init__(self, W: Tensor, scale: Tensor, generator: torch.Generator) -> None:
        self.W = W
        self._inverse = (1.0 / scale).to(W.dtype)[:, None, None]
        self._generator = generator
        self._last = 0
        self.V = W.new_zeros(W.shape[0], W.shape[2], 0)
        self.P = W.new_zeros(W.shape[0], W.shape[1], 0)
        self._gram = W.new_zeros(W.shape[0], 0, 0)
        self._next = W.new_zeros(W.shape[0], W.shape[2], 0)
        self.random_columns = 0
        self.young_columns = 0

    @property
    def rank(self) -> int:
        """Columns of the basis."""
        return self.V.shape[2]

    @property
    def next_columns(self) -> int:
        """Columns of the block that the last residual pass computed."""
        return self._next.shape[2]

    def times(self, X: Tensor) -> Tensor:
        """``W X / scale``."""
        return (self.W @ X) * self._inverse

    def times_t(self, Y: Tensor) -> Tensor:
        """``W^T Y / scale``, computed as ``(Y^T W)^T``, which reads ``W`` along its rows."""
        return ((Y.mT @ self.W) * self._inverse).mT

    def gaussian(self, rows: int, columns: int) -> Tensor:
        """One Gaussian block shared by the batch, so that a result does not depend on what it was batched with."""
        shape = (rows, columns)
        block = torch.randn(shape, generator=self._generator, device=self._generator.device, dtype=torch.float32)
        return block.to(self.W).expand(self.W.shape[0], *shape)

    def start(self, columns: int, init: Tensor | None) -> None:
        """First block: a sketch of the row space, or a subspace known from before."""
        sketch = self.times_t(self.gaussian(self.W.shape[1], columns)) if init is None else init
        self.random_columns = sketch.shape[2]
        self.append(sketch)

    def append(self, Z: Tensor) -> None:
        """Orthonormalise ``Z`` against the basis and add it: one pass over ``W``."""
        block = orthonormal(Z, self.V)
        product = self.times(block)
        cross = self.P.mT @ product
        corner = product.mT @ product
        top = torch.cat([self._gram, cross], dim=2)
        self._gram = torch.cat([top, torch.cat([cross.mT, corner], dim=2)], dim=1)
        self.V = torch.cat([self.V, block], dim=2)
        self.P = torch.cat([self.P, product], dim=2)
        self._last = block.shape[2]

    def ritz(self) -> Ritz:
        """Ritz triplets of the basis and their residuals: one pass over ``W``, kept as the next block."""
        values, Y = _eigh(self._gram)
        S, Y = values.clamp_min(0).sqrt().flip(-1), Y.flip(-1)
        Z = self.times_t(self.P[:, :, self.rank - self._last :])
        self._next = Z - self.V @ (self.V.mT @ Z)
        inside = Y[:, self.rank - self._last :, :]
        leak = (inside * ((self._next.mT @ self._next) @ inside)).sum(dim=1).clamp_min(0).sqrt()
        residual = torch.where(S > 0, leak / S.clamp_min(torch.finfo(S.dtype).tiny), leak)
        return Ritz(S, residual, Y)

    def expand(self, fresh: int) -> None:
        """Add the block that the last residual pass computed, and ``fresh`` new random columns."""
        block = self._next
        self.random_columns, self.young_columns = self.random_columns + self.young_columns, fresh
        if fresh > 0:
            block = torch.cat([block, self.gaussian(self.W.shape[2], fresh)], dim=2)
        self.append(block)

    def triplets(self, ritz: Ritz, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """``U (B, m, count), S (B, count), Vh (B, count, n)`` of the leading Ritz triplets, in scaled units."""
        Y = ritz.coordinates[:, :, :count]
        S = ritz.S[:, :count]
        inverse = torch.where(S > 0, 1.0 / S.clamp_min(torch.finfo(S.dtype).tiny), torch.zeros_like(S))
        return (self.P @ Y) * inverse[:, None, :], S, (self.V @ Y).mT


def orthonormal(Z: Tensor, V: Tensor) -> Tensor:
    """An orthonormal basis of ``Z`` against ``V``; dependent directions become zero columns.

    Args:
        Z: block to orthonormalise, ``(B, n, b)``.
        V: orthonormal basis to stay orthogonal to, ``(B, n, r)``; may have no columns.

    Returns:
        ``(B, n, b)`` with columns orthonormal, or zero where ``Z`` has no direction left.
    """
    for _ in range(2):
        if V.shape[2]:
            Z = Z - V @ (V.mT @ Z)
        Z = _svqb(Z)
    return Z


def _svqb(Z: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(Z, dim=1, keepdim=True)
    Z = torch.where(norms > 0, Z / norms.clamp_min(torch.finfo(Z.dtype).tiny), torch.zeros_like(Z))
    values, Q = _eigh(Z.mT @ Z)
    floor = values[..., -1:] * (Z.shape[2] * torch.finfo(Z.dtype).eps)
    inverse = torch.where(values > floor, values.clamp_min(torch.finfo(Z.dtype).tiny).rsqrt(), 0.0)
    return Z @ (Q * inverse[:, None, :])


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenpairs of a small Gram matrix, worked out in float64: its spread is the square of the matrix's."""
    values, Q = torch.linalg.eigh(gram.double())
    return values.to(gram.dtype), Q.to(gram.dtype)
