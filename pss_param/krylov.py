# SPDX-License-Identifier: Apache-2.0
r"""Block Lanczos iteration on ``W^T W`` for the top of a spectrum: the engine of :mod:`pss_param.spectrum`.

``W (..., m, n)`` is anything that answers ``W @ X`` and ``Y @ W``: a tensor, or a matrix whose pieces lie on several
devices. ``m >= n`` in what follows; of a wide matrix it all holds of the transpose. A basis ``V (..., n, f)`` of right
directions grows block by block, and what ``W`` makes of it is kept, ``P = W V``.

1. A start ``X``, Gaussian but for what is known from before: ``V = orth(W^T X)``, then ``P = W V``.
2. A look: the Ritz triplets are those of the best right subspace. ``P^T P`` gives ``s`` and ``y``, ``v = V y`` and
   ``u = P y / s``. Then ``W v = s u`` holds to rounding, and the whole error is ``r = W^T u - s v``.
3. A pass back, ``R = (I - V V^T) W^T P_last``. From here on ``W^T P`` is known as a whole, and a look is one at the
   best left subspace, that of ``P``: Note [Two sides from one basis] in :mod:`pss_param.core`. Then ``W^T u = s v``
   holds to rounding, and the whole error is ``r = W v - s u``.
4. ``orth(R)`` joins ``V``; a pass forth makes its block of ``P``.

So every pass brings the triplets closer, as in a bidiagonalisation with two orthonormal bases, but only ``V`` has to be
orthonormal. The blocks of ``P`` are kept in float64: what they hold is the rounding of a product with ``W`` and of
nothing else, and ``P^T P`` squares it without loss.

# Note [A residual without its pass]
After a pass forth, what no pass has seen is ``E = W (I - V V^T)``, and ``E^T P_j = 0`` for all blocks but the last,
because ``W^T P_j`` lies in the span of ``V``; ``E^T X = 0`` likewise. So of ``u = P y / s`` only the part ``T`` of the
last block that lies outside of all others meets it, and

    ||W^T u - s v|| = ||E^T T y_last|| / s <= ||E|| ||T y_last|| / s :

the residual that the next pass would measure is bounded now, and better the smaller the unseen rest is. ``T^T T`` is
the last block of the Cholesky factor of ``[X P]^T [X P]``, times its transpose. After a pass back the same holds with
the sides exchanged, and ``R`` is what lies outside. Two bounds of ``||E||`` are at hand. ``||E||_F^2 = ||W||_F^2 -
||P||_F^2`` is certain, and sharp where a matrix has collapsed onto few directions. Where a bulk holds much energy in
many small values, the newest blocks of the basis tell more: they span what the iteration would have amplified most of
everything outside of the basis before they joined, and since then the outside has only shrunk. Within a dense bulk a
Krylov process does not see quite to the edge: its coefficients settle to those of the arcsine law, so that ``j`` newest
blocks ``N_j`` of width ``b`` show

    ||W N_j||^2 >= ||E||^2 (2 + 2 cos(pi / (j + 1)) + 2 sqrt(b / n)) / 4

of a bulk that reaches down to zero, which is the worst (the last term is the spread that ``b`` random directions find
by themselves). The newest is asked and the newest two (a third would say 12 % less, and cost more than that in a short
basis): two see deeper into a bulk, one has less of what stood above it and has been found by now. Up to six are asked
where they are a quarter of the basis at most. The first block has nothing before it to deflate and stays out. Here the
certificate rests on probability: it fails where a random block of 8 or more columns, multiplied by ``W`` twice or more,
is blind to the top of what it was drawn from.

# Note [Width of the block]
A Krylov space sees each repeated singular value at most as often as the start has random columns. So the number of
random columns is kept above the number of wanted values (Musco and Musco 2015 prove convergence independent of gaps for
that width), but for large matrices of a CPU (Note [Narrow blocks] in :mod:`pss_param.narrow`): when more values turn
out to be wanted, fresh Gaussian columns join the next block. They count once the block behind theirs is there, three
passes later, as those of the start do: before that they could not show a direction that was missed. Columns of the same
sketch that were left aside may still be added to the first block while it is the only one, and are then as old as the
others.

# Note [Bases]
What a pass back brings is projected out of the basis, and its Gram matrix serves both the look and, as a rule, the
Cholesky factor that makes it a block of the basis (Note [Blocks] in :mod:`pss_param.blocks`), which is projected once
more: what rounding has left of the basis in it, its normalisation has amplified. As that is orthogonal to the block
itself but for rounding, unit columns stay orthonormal to the square of it. So a block of which less than the root of
the rounding unit was taken is one of the basis as it is; where it was more, another round makes its columns orthonormal
again. Where it may be much, little but rounding was left, and columns that differ may be alike once they are projected:
then the block is orthonormalised by other means and projected, columns that are lost give way to random ones, and all
of it goes on until nothing of the block lies in the basis. All blocks keep their columns contiguous: Note [Which
kernel] in :mod:`pss_param.products`.

References:
    Golub and Van Loan, "Matrix Computations", 10.3.6 (block Lanczos); Golub, Luk and Overton, ACM TOMS 7 (1981);
    Halko, Martinsson and Tropp, SIAM Review 53 (2011); Musco and Musco, NeurIPS 2015.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from pss_param.arithmetic import DEVICE, HOST
from pss_param.blocks import INDEPENDENT, factor, gram, orthonormal
from pss_param.core import Coordinates, Core, Ritz
from pss_param.products import ThinProducts, on_gpu


class Matrix(Protocol):
    """What the iteration asks of matrices ``(..., m, n)``."""

    @property
    def shape(self) -> torch.Size:
        """``(..., m, n)``."""
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
        """``W @ X (..., n, b)``."""
        ...

    def __rmatmul__(self, Y: Tensor, /) -> Tensor:
        """``Y (..., b, m) @ W``."""
        ...


class Krylov:
    """A growing basis for a batch of matrices; see the module docstring for the algorithm.

    Args:
        W: the matrices ``(..., m, n)``; of wide ones all that follows is about the transpose.
        scale: ``||W||_F`` of each, ``(...)``, not zero.
        seed: of the random columns, which are drawn on the CPU: the same on every device, so that devices agree to
            rounding.

    Attributes:
        core: the small matrices.
        basis: orthonormal right directions, ``(..., n, f)``.
        random_columns: how many columns of the start have matured: Note [Width of the block].
        young_columns: random columns that have joined and not matured.
        inverse_scale: ``1 / ||W||_F``, ``(..., 1, 1)``, or a number.
        reached: whether the pass back has been made since a block joined.
    """

    core: Core
    basis: Tensor
    _image: Tensor
    random_columns: int
    young_columns: int
    reached: bool

    def __init__(self, W: Tensor | Matrix, scale: Tensor, seed: int) -> None:
        self.W = W
        self._wide = W.shape[-2] < W.shape[-1]
        self._n, self._m = sorted(W.shape[-2:])
        self.inverse_scale = (1.0 / scale).to(W.dtype)[..., None, None] if scale.dim() else 1.0 / float(scale)
        self._products = ThinProducts(W, self.inverse_scale)
        self._seed = seed
        self._draws = 0
        self._rounding = torch.finfo(W.dtype).eps ** 2  # of a product, over its length, squared

    @property
    def complete(self) -> bool:
        """Whether the triplets are the whole spectrum: the basis is full, and nothing is unseen."""
        return self.rank == self._n

    @property
    def next_columns(self) -> int:
        """Columns of the block that will join next, without fresh ones."""
        return self.core.widths[-1]

    @property
    def rank(self) -> int:
        """Columns of the basis."""
        return self.core.rank

    def forth(self, V: Tensor) -> Tensor:
        """``W V / ||W||_F``: one pass.

        Args:
            V: right directions ``(..., n, b)``.

        Returns:
            ``(..., m, b)``.
        """
        return (self._products.times_t if self._wide else self._products.times)(V)

    def back(self, U: Tensor) -> Tensor:
        """``W^T U / ||W||_F``: one pass.

        Args:
            U: left directions ``(..., m, b)``.

        Returns:
            ``(..., n, b)``.
        """
        return (self._products.times if self._wide else self._products.times_t)(U)

    def left_sketch(self, columns: int, known: Tensor | None = None) -> Tensor:
        """Left directions to begin with: one pass, or none where some are known.

        Args:
            columns: how many random ones, ``W`` times Gaussian columns.
            known: right directions of the matrix as it was given, which go first.

        Returns:
            ``(..., m, r + columns)``, not orthonormal.
        """
        if known is None:
            return self.forth(self._gaussian(self._n, columns))
        if self._wide:  # its right directions are the left ones here
            return beside(known, self._gaussian(self._m, columns))
        return self.forth(beside(known, self._gaussian(self._n, columns)))

    def drift(self, known: Tensor) -> float:
        """What the matrix moves out of the span of directions known from before: two narrow passes.

        Args:
            known: right directions of the matrix as it was given, ``(n, r)``, of which ``V`` is a basis.

        Returns:
            An estimate of ``||(I - V V^T) W^T U||_F`` for ``U = W V / s``, where all ``s`` are about the same.
        """
        there, again = (self.back, self.forth) if self._wide else (self.forth, self.back)
        V = orthonormal(known)
        mixed = V @ self._gaussian(V.shape[-1], _PROBES)
        image = again(there(mixed.mT.contiguous().mT))
        outside = image - V @ (V.mT @ image)
        size = float(torch.linalg.vector_norm(image)) / math.sqrt(_PROBES * V.shape[-1])
        return float(torch.linalg.vector_norm(outside)) / math.sqrt(_PROBES * max(size, 1e-30))

    def right_sketch(self, columns: int) -> Tensor:
        """Right directions to begin with: one pass.

        Args:
            columns: how many; ``W^T`` times Gaussian columns.

        Returns:
            ``(..., n, columns)``, not orthonormal.
        """
        return self.back(self._gaussian(self._m, columns))

    def start(self, right: Tensor, squares: Tensor | None = None) -> None:
        """Make the first block of the basis: one pass.

        Args:
            right: right directions to begin with, ``(..., n, b)``.
            squares: ``gram(right)``, where it is known already.
        """
        self._begin(right)
        self._join(orthonormal(right, squares))

    def widen(self, right: Tensor) -> None:
        """More columns for the first block, as long as it is the only one: one pass.

        Args:
            right: right directions like those that it began with, ``(n, b)``.
        """
        image, block = self._image, right.clone()
        self._project(block)
        self._join(self._apart(orthonormal(block)))
        self._image = beside(image, self._image)
        self.core.merge()
        self.random_columns += right.shape[-1]

    def start_left(self, left: Tensor, squares: Tensor | None = None) -> None:
        """Make the first block of the basis from left directions, which bound what it has not seen: two passes.

        Args:
            left: left directions to begin with, ``(..., m, b)``.
            squares: ``gram(left)``, where it is known already.
        """
        X = orthonormal(left, squares)
        self._begin(left)
        self.core.anchor(self._kept(X))
        self._join(orthonormal(self.back(X)))

    def advance(self, fresh: int = 0) -> None:
        """One pass: back from the last block, or forth with what that found.

        Args:
            fresh: random columns to join beside it.
        """
        if not self.reached:
            self._reach()
            return
        block = self._joined(fresh, self._n - self.rank)
        self.random_columns += self.young_columns
        self.young_columns = max(0, block.shape[-1] - self.next_columns)
        self._join(block)

    def ritz(self) -> Ritz:
        """Singular triplets of the matrices on the basis, with their residuals or bounds on them.

        Returns:
            Values, residuals and coordinates.
        """
        return self.core.ritz(self._squares_of_rest if self.reached else None)

    def right_ritz(self) -> Ritz:
        """The same on the right basis, whose residuals the last pass, one back, has measured.

        Returns:
            Values, residuals and coordinates.
        """
        return self.core.right_ritz(self._squares_of_rest)

    def triplets(self, ritz: Ritz, index: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Leading Ritz triplets of one matrix, in scaled units.

        Args:
            ritz: the present Ritz triplets.
            index: which matrix of the batch.
            count: how many triplets.

        Returns:
            ``U (m, count), S (count,), Vh (count, n)`` of the matrix as it was given.
        """
        parts, held = self.core.coordinates(ritz, count).of(index), (self._P, self.basis, self._rest)
        P, V, R = (part[index] if part.dim() > 2 else part for part in held)
        return self._triplets(ritz.S[index][:count], parts, (P, V, R))

    def all_triplets(self, ritz: Ritz, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Leading Ritz triplets of all matrices of a batch, in scaled units.

        Args:
            ritz: the present Ritz triplets.
            count: how many triplets of each.

        Returns:
            ``U (B, m, count), S (B, count), Vh (B, count, n)``.
        """
        S, held = [line[:count] for line in ritz.S], (self._P, self.basis, self._rest)
        return self._triplets(S, self.core.coordinates(ritz, count), held)

    def _triplets(
        self, values: list[Any], parts: Coordinates, held: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        P, V, R = held
        Vh = parts.in_V.to(V) @ V.mT
        if parts.in_R is None:
            P = P.narrow(-2, P.shape[-2] - self.rank, self.rank)
        else:
            Vh += parts.in_R.to(V) @ R.mT
        U = (parts.in_P.to(P.device) @ P).to(V.dtype)
        S = torch.tensor(values, dtype=V.dtype, device=V.device)
        return (Vh.mT, S, U) if self._wide else (U.mT, S, Vh)

    def _begin(self, block: Tensor) -> None:
        self.young_columns, self.random_columns = 0, block.shape[-1]
        single = block.dim() == 2 or not on_gpu(block)
        self.core = Core((self._m, self._n), HOST if single else DEVICE, torch.finfo(self.W.dtype).eps)
        self.basis = self._rest = block[..., :0]
        self._V = block.new_empty(*block.shape[:-2], 0, self._n)
        self._room = self._P = block.new_empty(*block.shape[:-2], 0, self._m, dtype=torch.float64)

    def _join(self, block: Tensor) -> None:
        """A block of the basis, and its image: one pass."""
        held, added = self.rank, block.shape[-1]
        self._V = _with_room(self._V, held + added)
        self._V.narrow(-2, held, added).copy_(block.mT)
        self.basis = self._V.narrow(-2, 0, held + added).mT
        self._image = self.forth(block)
        self.core.append(self._kept(self._image))
        self.reached = False

    def _kept(self, block: Tensor) -> Tensor:
        """Put left directions beside those that are held; the products of all with them."""
        held, added = self._P.shape[-2], block.shape[-1]
        self._room = _with_room(self._room, held + added)
        rows = self._room.narrow(-2, held, added).copy_(block.mT)
        self._P = self._room.narrow(-2, 0, held + added)
        return self._P @ rows.mT

    def _reach(self) -> None:
        """One pass: what ``W^T`` makes of the last block, without what the basis spans."""
        rest = self.back(self._image)
        self._project(rest)
        self._rest, self._squares_of_rest, self.reached = rest, gram(rest), True

    def _joined(self, fresh: int, room: int) -> Tensor:
        """An orthonormal block for the basis, of what the pass back found and fresh random columns."""
        R, last = self._rest, self.next_columns
        if not fresh and room >= last:
            found = factor(self._squares_of_rest, self._rounding * self.core.last_squares())
            if found.spoilt < _MENDABLE:
                apart = found.fall > INDEPENDENT
                Q = found.columns(R) if apart else found.columns(R.double()).to(R.dtype)
                taken = float(torch.linalg.vector_norm(self._project(Q), dim=-2).max())  # of any column
                if taken < math.sqrt(torch.finfo(R.dtype).eps) and (apart or R.dtype != torch.float64):
                    return Q
                if taken < _MENDABLE:
                    return orthonormal(Q)
        if room < last:  # the basis is full with less than R has columns; R's range has no more dimensions
            return self._apart(torch.linalg.svd(R, full_matrices=False).U[..., :room])
        random = self._gaussian(self._n, min(fresh, room - last))
        return self._apart(orthonormal(beside(R, random) if random.shape[-1] else R))

    def _apart(self, Q: Tensor) -> Tensor:
        """Orthonormal columns outside of the basis, of orthonormal ones that may be rounding and lie anywhere."""
        for _ in range(_ROUNDS):
            self._project(Q)
            lost = torch.linalg.vector_norm(Q, dim=-2) < _SURVIVES
            if bool(lost.any()):  # a new direction takes its place
                random = self._gaussian(*Q.shape[-2:]).clone()
                self._project(random)
                Q = torch.where(lost[..., None, :], random, Q)
            Q = orthonormal(Q)
            # Columns that were alike after the projection have been replaced by ones that know nothing of it.
            if float((self.basis.mT @ Q).abs().max()) < _APART * torch.finfo(Q.dtype).eps:
                break
        return Q

    def _project(self, block: Tensor) -> Tensor:
        """Take out of a block, in place, what the basis spans; the coordinates ``(..., f, b)`` of what was taken."""
        share = self.basis.mT @ block
        (block.addmm_ if block.dim() == 2 else block.baddbmm_)(self.basis, share, alpha=-1)
        return share

    def _gaussian(self, rows: int, columns: int) -> Tensor:
        """One block shared by the batch, so that no result depends on what a matrix was batched with."""
        block = _drawn(self._seed + self._draws, rows, columns, self.W.dtype, self.W.device)
        self._draws += 1
        return block.expand(*self.W.shape[:-2], rows, columns) if len(self.W.shape) > 2 else block


def beside(left: Tensor, right: Tensor) -> Tensor:
    """Columns beside columns, all contiguous."""
    return torch.cat([left.mT, right.mT], dim=-2).mT


def _with_room(rows: Tensor, needed: int) -> Tensor:
    """A buffer for at least so many rows, twice as many as before where it has to grow."""
    held = rows.shape[-2]
    if held >= needed:
        return rows
    room = max(needed, 2 * held) if held else _BLOCKS_AT_FIRST * needed
    more = rows.new_empty(*rows.shape[:-2], room, rows.shape[-1])
    more[..., :held, :] = rows
    return more


@lru_cache(maxsize=8)
def _drawn(seed: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same numbers for matrices of one shape, drawn once, on the CPU; nobody writes to them."""
    return torch.randn(columns, rows, generator=torch.Generator().manual_seed(seed), device="cpu").to(device, dtype).mT


_BLOCKS_AT_FIRST = 4
_PROBES = 8
_MENDABLE = 0.1  # of unit columns may be projected out of them and leave them independent
_APART = 100  # rounding units
_ROUNDS = 4
_SURVIVES = 0.5  # of a unit column that is orthogonal but for rounding
