# SPDX-License-Identifier: Apache-2.0
r"""Randomized block Krylov iteration for the top of a spectrum: the engine of :mod:`pss_param.spectrum`.

Notation: ``W (B, m, n)``, ``V (B, n, r)`` an orthonormal basis, ``P = W V``. ``W`` is anything that answers ``W @ X``
and ``Y @ W``: a tensor, or a matrix whose pieces lie on several devices.

1. A Gaussian sketch, ``V = orth(W^T Omega)``; every pass over ``W`` is one matrix product with a thin block.
2. Rayleigh-Ritz on ``V``: the eigenpairs of ``P^T P`` give ``s``, ``v = V y`` and ``u = P y / s``, so that
   ``W v = s u`` holds to rounding and the whole error is in ``W^T u - s v``.
3. ``Z = W^T P_last``. In a Krylov basis ``W^T P`` leaves the span of ``V`` only through its last block, so the
   residual of every triplet is ``||(I - V V^T) Z y_last|| / s``: the pass that measures the error is the pass that
   enlarges the basis.

# Note [Width of the block]
A Krylov space sees each repeated singular value at most as often as the start has random columns. So the number of
random columns is kept above the number of wanted values (Musco and Musco 2015 prove convergence independent of gaps
for that width): when more values turn out to be wanted, fresh Gaussian columns join the next block. They count only
after the pass that follows has turned them towards the top of the spectrum; before that they could not show a
direction that was missed.

References:
    Halko, Martinsson and Tropp, SIAM Review 53 (2011); Musco and Musco, NeurIPS 2015.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Matrix(Protocol):
    """What the iteration asks of a batch of matrices ``(B, m, n)``."""

    @property
    def shape(self) -> torch.Size:
        """``(B, m, n)``."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the arithmetic, float32 or float64."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the arithmetic."""
        ...

    def __matmul__(self, X: Tensor, /) -> Tensor:
        """``W @ X (B, n, b)``."""
        ...

    def __rmatmul__(self, Y: Tensor, /) -> Tensor:
        """``Y (B, b, m) @ W``."""
        ...


@dataclass(frozen=True)
class Ritz:
    """What a basis knows: triplets in descending order of ``S``, scaled to ``||W||_F = 1``."""

    S: Tensor  # (B, r)
    residual: Tensor  # (B, r): ||W^T u - s v||
    coordinates: Tensor  # (B, r, r): v = V @ coordinates


class Krylov:
    """A growing basis for one batch of matrices; see the module docstring for the algorithm.

    Args:
        W: the matrices.
        scale: ``||W||_F`` of each, ``(B,)``, not zero.
        generator: a CPU generator: the same sketch on every device, so that devices agree to rounding.

    Attributes:
        V: the basis, ``(B, n, r)``.
        P: ``W V / scale``.
        inverse_scale: ``1 / scale``, ``(B, 1, 1)``.
        random_columns: how many columns of the start have matured: Note [Width of the block].
        young_columns: how many joined last and have not.
    """

    def __init__(self, W: Tensor | Matrix, scale: Tensor, generator: torch.Generator) -> None:
        self.W = W
        self.inverse_scale = (1.0 / scale).to(W.dtype)[:, None, None]
        self._generator = generator
        self._last = 0
        empty = torch.zeros(0, dtype=W.dtype, device=W.device)
        self.V = empty.new_zeros(W.shape[0], W.shape[2], 0)
        self.P = empty.new_zeros(W.shape[0], W.shape[1], 0)
        self._gram = empty.new_zeros(W.shape[0], 0, 0)
        self._next = self.V
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

    def start(self, columns: int, init: Tensor | None) -> None:
        """Begin with a sketch of the row space, or with a subspace known from before.

        Args:
            columns: width of the sketch.
            init: the known subspace, ``(B, n, b)``.
        """
        if init is None:
            init = self._times_t(self._gaussian(self.W.shape[1], columns))
        self.random_columns = init.shape[2]
        self._append(torch.linalg.qr(init).Q)

    def ritz(self) -> Ritz:
        """Rayleigh-Ritz with residuals: one pass over ``W``, kept as the next block.

        Returns:
            Values, residuals and coordinates.
        """
        values, Y = _eigh(self._gram)
        S, Y = values.clamp_min(0).sqrt().flip(-1), Y.flip(-1)
        Z = self._times_t(self.P[:, :, self.rank - self._last :])
        self._next = Z - self.V @ (self.V.mT @ Z)
        inside = Y[:, self.rank - self._last :, :]
        leak = torch.linalg.vector_norm(self._next @ inside, dim=1)
        return Ritz(S, torch.where(S > 0, leak / S, leak), Y)

    def ceilings(self, ritz: Ritz, index: int, reference: float) -> list[float] | None:
        r"""Upper bounds on the singular values of one matrix: Note [Ceilings] in :mod:`pss_param.certificate`.

        Args:
            ritz: the Ritz decomposition of the present basis.
            index: which matrix of the batch.
            reference: the bounds hold for values at and above this one, in scaled units.

        Returns:
            A bound for each Ritz value, descending; ``None`` where the rest of the matrix reaches up to ``reference``.
        """
        first = self.rank - self._last
        rest = float(torch.linalg.eigvalsh(self._gram[index, first:, first:].double())[-1])
        gap = reference * reference - rest
        if gap <= 0:
            return None
        inside, outside = ritz.coordinates[index, first:], self._next[index]
        coupling = (inside.mT @ (outside.mT @ outside) @ inside).double()
        values = torch.linalg.eigvalsh(torch.diag(ritz.S[index].double().square()) + coupling / gap)
        return list(values.clamp_min(0).sqrt().flip(0).tolist())

    def expand(self, fresh: int, columns: int) -> None:
        """Add the block that the last residual pass computed: one pass over ``W``.

        Args:
            fresh: new random columns beside it.
            columns: how many columns there is room for.
        """
        block = self._next
        self.random_columns, self.young_columns = self.random_columns + self.young_columns, fresh
        if fresh > 0:
            block = torch.cat([block, self._gaussian(self.W.shape[2], fresh)], dim=2)
        # Twice is enough (Kahan): the second round also turns what was only rounding into directions of its own.
        block = torch.linalg.qr(block[:, :, :columns]).Q
        self._append(torch.linalg.qr(block - self.V @ (self.V.mT @ block)).Q)

    def triplets(self, ritz: Ritz, index: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Leading Ritz triplets of one matrix, in scaled units.

        Args:
            ritz: the Ritz decomposition of the present basis.
            index: which matrix of the batch.
            count: how many triplets.

        Returns:
            ``U (m, count), S (count,), Vh (count, n)``.
        """
        Y, S = ritz.coordinates[index, :, :count], ritz.S[index, :count]
        inverse = torch.where(S > 0, 1.0 / S, torch.zeros_like(S))
        return (self.P[index] @ Y) * inverse, S, (self.V[index] @ Y).mT

    def _times(self, X: Tensor) -> Tensor:
        return (self.W @ X) * self.inverse_scale

    def _times_t(self, Y: Tensor) -> Tensor:
        # (Y^T W)^T reads W along its rows, which is faster than W^T Y.
        return ((Y.mT @ self.W) * self.inverse_scale).mT

    def _gaussian(self, rows: int, columns: int) -> Tensor:
        """One block shared by the batch, so that no result depends on what a matrix was batched with."""
        block = torch.randn(rows, columns, generator=self._generator)
        return block.to(self.W.device, self.W.dtype).expand(self.W.shape[0], rows, columns)

    def _append(self, block: Tensor) -> None:
        product = self._times(block)
        cross, corner = self.P.mT @ product, product.mT @ product
        top = torch.cat([self._gram, cross], dim=2)
        self._gram = torch.cat([top, torch.cat([cross.mT, corner], dim=2)], dim=1)
        self.V = torch.cat([self.V, block], dim=2)
        self.P = torch.cat([self.P, product], dim=2)
        self._last = block.shape[2]


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenpairs of a small Gram matrix, worked out in float64: its spread is the square of the matrix's."""
    values, Q = torch.linalg.eigh(gram.double())
    return values.to(gram.dtype), Q.to(gram.dtype)
