# SPDX-License-Identifier: Apache-2.0
r"""The small matrices of a block iteration: Ritz values and vectors, residuals, and bounds of what is unseen.

Everything here follows from ``G = [X P]^T [X P]`` and ``R^T R`` in float64, a few dozen to a few hundred columns, of
matrices ``W (m, n)`` with ``||W||_F = 1``; what the letters stand for is said in :mod:`pss_param.krylov`.

# Note [Two sides from one basis]
``V`` is orthonormal and ``P = W V``, so ``P^T P`` is all that the right subspace knows of ``W^T W``. Behind a pass
back, the left one is known as well: with ``G = L L^T`` the columns of ``U = [X P] L^-T`` are orthonormal, and as
``W^T`` of everything but the last block lies in the span of ``V``,

    W^T U = V L' + [0 R L''^-T],    (W^T U)^T (W^T U) = L'^T L' + [0 0; 0 L''^-1 R^T R L''^-T],

where ``L'`` are the rows of ``L`` that belong to ``P`` and ``L''`` is its last block on the diagonal. So neither ``U``
nor anything else of the left side has to be formed before its triplets are wanted. ``R`` carries the rounding of
products as long as ``P``, of which ``L''^-1`` makes more; where that would be more than the certificate counts as
rounding, because the last block is nearly dependent on itself or the others, the right side has to do, with residuals
that ``R`` tells exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from pss_param.arithmetic import Arithmetic, Array

__all__ = ["Coordinates", "Core", "Ritz"]

_NEWEST_BLOCKS, _FEW = 6, 2
_SHARE_OF_BASIS = 4
_INDEPENDENT = 1e-3  # the least of a column that may lie outside of all before it, over its length
_TINY = 1e-300  # stands for zero
_ROUNDING = float(np.finfo(np.float64).eps)
_LEAST = 1.5e-8  # of the largest value: below it there is nothing but the rounding of squares


@dataclass(frozen=True)
class Ritz:
    """What is known of each matrix: triplets in descending order of ``S``, scaled to ``||W||_F = 1``.

    Attributes:
        S: values.
        residual: bounds on what ``W`` or ``W^T`` misses of each triplet.
        rest: bound on ``||E||^2`` of the side that the triplets are of.
        squares: of ``W`` or ``W^T`` on that side's basis, ``(B, f, f)``.
        Y: coordinates in that basis, in ascending order of ``S``.
        coupling: of its last block with what is unseen, squared, or a bound on it, ``(B, b, b)``.
        L: of Note [Two sides from one basis] where it is the left side.
    """

    S: list[list[float]]
    residual: list[list[float]]
    rest: list[float]
    squares: Array
    Y: Array
    coupling: Array
    L: Array | None


class Coordinates(NamedTuple):
    """What the leading triplets are made of: float64 rows, in descending order of ``S``.

    Attributes:
        in_P: of ``u``, ``(B, count, f)`` in ``P``, or ``(B, count, h)`` in ``[X P]``.
        in_V: of ``v``, ``(B, count, f)``.
        in_R: of ``v``, ``(B, count, b)``; ``None`` where it has nothing of ``R``.
    """

    in_P: Tensor
    in_V: Tensor
    in_R: Tensor | None

    def of(self, index: int) -> Coordinates:
        """Those of one matrix.

        Args:
            index: which of the batch.

        Returns:
            The same without the first dimension.
        """
        return Coordinates(self.in_P[index], self.in_V[index], None if self.in_R is None else self.in_R[index])


class Core:
    """``G`` of a batch, which grows block by block, and what follows from it.

    Args:
        shape: ``(m, n)``.
        arithmetic: numpy's or torch's.
        eps: rounding unit of the products with ``W``.

    Attributes:
        widths: columns of the blocks of ``P``.
    """

    def __init__(self, shape: tuple[int, int], arithmetic: Arithmetic, eps: float) -> None:
        self.widths: list[int] = []
        self._m, self._n = shape
        self._have, self._eps = arithmetic, eps
        self._anchored = self._held = 0
        self._buffer: Array = None

    @property
    def rank(self) -> int:
        """Columns of ``P``."""
        return self._held - self._anchored

    def anchor(self, products: Tensor) -> None:
        """Begin with columns that are no part of ``P``.

        Args:
            products: ``X^T X (..., a, a)``.
        """
        self._add(products)
        self._anchored = self._held

    def append(self, products: Tensor) -> None:
        """Add a block of ``P``.

        Args:
            products: ``[X P]^T P_new (..., h + b, b)``.
        """
        self._add(products)
        self.widths.append(products.shape[-1])

    def merge(self) -> None:
        """Make one block of the last two, of which neither has been there longer than the other."""
        last = self.widths.pop()
        self.widths[-1] += last

    def values(self) -> list[list[float]]:
        """Ritz values on the right basis, without what goes with them.

        Returns:
            Of each matrix, descending.
        """
        squares = self._buffer[:, self._anchored : self._held, self._anchored : self._held]
        return _roots(self._have.eigvalsh(squares).tolist())

    def ritz(self, returned: Tensor | None) -> Ritz:
        """Singular triplets on the right basis, or on the left one behind a pass back.

        Args:
            returned: ``R^T R (..., b, b)``.

        Returns:
            The triplets with bounds on their residuals: one synchronisation with a device, two behind a pass back.
        """
        G = self._buffer[:, : self._held, : self._held]
        L, sound = self._have.cholesky(G)
        if returned is None:
            return self._right(self._outside(G, L, sound))
        inverse, squares = self._inverse(G, L, sound), self._have.taken(returned)
        return self._right(squares, measured=True) if inverse is None else self._left(L, inverse, squares)

    def right_ritz(self, returned: Tensor) -> Ritz:
        """Singular triplets on the right basis behind a pass back, with residuals that this has measured.

        Args:
            returned: ``R^T R (..., b, b)``.

        Returns:
            The triplets: one synchronisation with a device.
        """
        return self._right(self._have.taken(returned), measured=True)

    def ceilings(self, ritz: Ritz, references: Mapping[int, float]) -> dict[int, list[float]]:
        r"""Upper bounds on the singular values of some matrices: Note [Ceilings] in :mod:`pss_param.certificate`.

        Args:
            ritz: the present Ritz triplets.
            references: by place in the batch; the bounds hold for values at and above, in scaled units.

        Returns:
            A bound for each Ritz value, descending; not of matrices of which the rest reaches up to the reference.
        """
        weights = {i: 1 / (c * c - ritz.rest[i]) for i, c in references.items() if c * c > ritz.rest[i]}
        if not weights:
            return {}
        chosen, last = list(weights), ritz.coupling.shape[-1]
        raised = ritz.squares[chosen]
        lift = self._have.array(list(weights.values()), raised)[:, None, None]
        raised[:, -last:, -last:] += lift * ritz.coupling[chosen]
        return dict(zip(chosen, _roots(self._have.eigvalsh(raised).tolist()), strict=True))

    def coordinates(self, ritz: Ritz, count: int) -> Coordinates:
        """What the leading triplets are made of.

        Args:
            ritz: the present Ritz triplets.
            count: how many.

        Returns:
            On the device, or on the host where the small matrices are there.
        """
        have, Y = self._have, self._have.descending(ritz.Y, count)
        S = [[max(s, _LEAST * line[0], _TINY) for s in line[:count]] for line in ritz.S]
        over_S = Y / have.array(S, Y)[:, None]
        if ritz.L is None:
            return Coordinates(have.given(over_S).mT, have.given(Y).mT, None)
        in_P, right = have.solved(ritz.L, Y), have.product(ritz.L[:, self._anchored :], over_S)
        in_R = in_P[:, -self.widths[-1] :] / have.array(S, Y)[:, None]
        return Coordinates(*(have.given(part).mT for part in (in_P, right, in_R)))

    def last_squares(self) -> Array:
        """Squared lengths of the columns of the last block of ``P``.

        Returns:
            ``(B, b)``.
        """
        return self._buffer.diagonal(0, -2, -1)[:, self._held - self.widths[-1] : self._held]

    def _add(self, products: Tensor) -> None:
        block = self._have.taken(products)
        at, end = self._held, block.shape[1]
        if self._buffer is None or self._buffer.shape[1] < end:
            longer = self._have.empty((len(block), 2 * end, 2 * end), block)
            if at:
                longer[:, :at, :at] = self._buffer[:, :at, :at]
            self._buffer = longer
        self._buffer[:, :end, at:end] = block
        self._buffer[:, at:end, :at] = block[:, :at].swapaxes(-1, -2)
        self._held = end

    def _outside(self, G: Array, L: Array, sound: Array) -> Array:
        """``T^T T``: Note [A residual without its pass] in :mod:`pss_param.krylov`."""
        last = self.widths[-1]
        corner = L[:, -last:, -last:]
        squares = self._have.product(corner, corner.swapaxes(-1, -2))
        if self._have.at_hand and sound.all():
            return squares
        # Without a factor the last block is as good as dependent on the others; a part is no longer than the whole.
        return self._have.where(sound[:, None, None], squares, G[:, -last:, -last:])

    def _inverse(self, G: Array, L: Array, sound: Array) -> Array | None:
        """``L''^-1``; ``None`` where it would make too much of the rounding in the last block."""
        if self._have.at_hand and not sound.all():
            return None
        last = self.widths[-1]
        lengths = G.diagonal(0, -2, -1) ** 0.5
        falls = L.diagonal(0, -2, -1) / lengths
        if not self._have.at_hand:
            falls = self._have.where(sound[:, None], falls, 0.0)
        inverse = self._have.inverse(L[:, -last:, -last:])
        grown = ((inverse * lengths[:, None, -last:]) ** 2).sum((-2, -1))
        fall, most = self._have.both(falls.min(), grown.max())
        # The certificate counts four units times the root of m as rounding.
        return inverse if fall > _INDEPENDENT and most < 4 * self._m else None

    def _right(self, outside: Array, measured: bool = False) -> Ritz:
        """From ``T^T T``, which is met by no more than the unseen rest, or from ``R^T R``."""
        squares = self._buffer[:, self._anchored : self._held, self._anchored : self._held]
        rest = self._bound_of_the_rest(squares, self.widths)
        return self._ritz(squares, rest, outside if measured else rest[:, None, None] * outside, None)

    def _left(self, L: Array, inverse: Array, returned: Array) -> Ritz:
        last, rows = self.widths[-1], L[:, self._anchored :]
        product = self._have.product
        outside = product(product(inverse, returned), inverse.swapaxes(-1, -2))
        squares = product(rows.swapaxes(-1, -2), rows)
        squares[:, -last:, -last:] += outside
        widths = [self._anchored, *self.widths] if self._anchored else self.widths
        rest = self._bound_of_the_rest(squares, widths)
        return self._ritz(squares, rest, rest[:, None, None] * outside, L)

    def _ritz(self, squares: Array, rest: Array, coupling: Array, L: Tensor | None) -> Ritz:
        values, Y = self._have.eigh(squares)
        tail = Y[:, -coupling.shape[-1] :, :]
        residual = (tail * self._have.product(coupling, tail)).sum(-2) / self._have.at_least(values, _TINY)
        residual = self._have.at_most(residual, rest[:, None])  # as T y / s is at most a unit vector
        S, residuals, rests = self._have.numbers(values, residual, rest)
        return Ritz(_roots(S), _roots(residuals), rests, squares, Y, coupling, L)

    def _bound_of_the_rest(self, squares: Array, widths: list[int]) -> Array:
        """``||E||^2`` by Note [A residual without its pass] in :mod:`pss_param.krylov`."""
        slack = 4 * _ROUNDING * math.sqrt(self._m)
        if self.rank < self._n:  # what is left of the norm is known no better than the products
            slack = max(slack, 2 * self._eps)
        bound = self._have.at_least(1.0 + slack - squares.diagonal(0, -2, -1).sum(-1), slack)
        for j in range(1, min(_NEWEST_BLOCKS, len(widths) - 1) + 1):
            columns = sum(widths[-j:])
            if j > _FEW and _SHARE_OF_BASIS * columns > self.rank:
                break
            seen = 2 + 2 * math.cos(math.pi / (j + 1)) + 2 * math.sqrt(columns / j / self._n)
            newest = self._have.largest(squares[:, -columns:, -columns:])
            bound = self._have.at_most(bound, newest * max(1.0, 4 / seen))
        return bound


def _roots(squares: list[list[float]]) -> list[list[float]]:
    """Square roots in descending order; what is below zero is rounding."""
    return [[math.sqrt(x) if x > 0 else 0.0 for x in reversed(line)] for line in squares]
