# SPDX-License-Identifier: Apache-2.0
r"""Block Golub-Kahan iteration for the top of a spectrum: the engine of :mod:`pss_param.spectrum`.

``W (..., m, n)`` is anything that answers ``W @ X`` and ``Y @ W``: a tensor, or a matrix whose pieces lie on several
devices. Two orthonormal bases grow in turn, ``V (..., n, f)`` of right and ``U (..., m, a)`` of left directions. Every
pass over ``W`` is one product with the block that joined last, of the side called the *front*, and leads to the
*other* side; with the front on the right,

    W V = U B + T,    W^T U = V B^T,

where ``T`` is what the last pass found outside of ``U``: the only thing that is not known yet. The core ``B (a, f)``
is small.

1. A Gaussian sketch, ``U = orth(W Omega)``, and one pass that makes ``V = orth(W^T U)``. With a front on the left,
   all of the following holds of the transpose.
2. After every pass ``W V = U B + T`` is known on the whole front, so the Ritz triplets are those of the best right
   subspace: ``V^T W^T W V = B^T B + T^T T`` gives ``s`` and ``y``, ``v = V y`` and ``u = W v / s``. Then ``W v = s u``
   holds to rounding, and the whole error is ``r = W^T u - s v``.
3. ``orth(T)`` joins the other side, which becomes the front: the two sides change their roles with every pass.

# Note [A residual without its pass]
What no pass has seen is ``E = W (I - V V^T)``, and ``U^T E = 0`` because ``W^T U`` lies in the span of ``V``. So of
``u = (U B y + T y_last) / s`` only the second part meets it, and

    ||W^T u - s v|| = ||E^T T y_last|| / s <= ||E|| ||T y_last|| / s :

the residual that the next pass would measure is bounded now, and better the smaller the unseen rest is. Two bounds of
``||E||`` are at hand. ``||E||_F^2 = ||W||_F^2 - ||B||_F^2 - ||T||_F^2`` is certain, and sharp where a matrix has
collapsed onto few directions. Where a bulk holds much energy in many small values, the newest blocks of the front
tell more: they span what the iteration would have amplified most of everything outside of the front before they
joined, and since then the outside has only shrunk. Within a dense bulk a Krylov process does not see quite to the
edge: its coefficients settle to those of the arcsine law, so that ``j`` newest blocks ``N_j`` of width ``b`` show

    ||W N_j||^2 >= ||E||^2 (2 + 2 cos(pi / (j + 1)) + 2 sqrt(b / n)) / 4

of a bulk that reaches down to zero, which is the worst (the last term is the spread that ``b`` random directions find
by themselves). The smaller of the bounds for ``j = 1`` and ``j = 3`` counts; the first block of the front has nothing
before it to deflate and stays out. This is the one place where the certificate rests on probability: it fails where a
random block of 8 or more columns, multiplied by ``W`` twice or more, is blind to the top of what it was drawn from.

# Note [Width of the block]
A Krylov space sees each repeated singular value at most as often as the start has random columns. So the number of
random columns is kept above the number of wanted values (Musco and Musco 2015 prove convergence independent of gaps
for that width): when more values turn out to be wanted, fresh Gaussian columns join the next block. They count after
three passes, as those of the start do: one that turns them towards the top of the spectrum, one that enters them in a
core, and one that measures; before that they could not show a direction that was missed.

# Note [Bases]
What a pass brings is projected out of the other side twice, so that it is orthogonal to it to the rounding of itself,
and its Gram matrix serves both the Ritz values and, as a rule, the Cholesky factor that makes it a block of the basis
(Note [Blocks] in :mod:`pss_param.blocks`). Where that would amplify its rounding, the block is projected and
orthonormalised once more. All bases keep their columns contiguous: Note [Which kernel] in :mod:`pss_param.products`.

References:
    Golub, Luk and Overton, ACM TOMS 7 (1981); Halko, Martinsson and Tropp, SIAM Review 53 (2011);
    Musco and Musco, NeurIPS 2015.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from pss_param.blocks import INDEPENDENT, factor, gram, orthonormal
from pss_param.eigen import eigh, eigvalsh, largest
from pss_param.products import times, times_t


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


_NEWEST_BLOCKS = (1, 3)


@dataclass(frozen=True)
class Ritz:
    """What the bases know: triplets in descending order of ``S``, scaled to ``||W||_F = 1``, in float64."""

    S: Tensor  # (..., f)
    residual: Tensor  # (..., f): bound on ||W^T u - s v||
    Y: Tensor  # (..., f, f): coordinates in the basis of the front
    rest: Tensor  # (...): bound on ||E||
    gram: Tensor  # (..., f, f): B^T B + T^T T
    gram_of_new: Tensor  # (..., b, b): T^T T


class Krylov:
    """Two growing bases for a batch of matrices; see the module docstring for the algorithm.

    Args:
        W: the matrices ``(..., m, n)``.
        scale: ``||W||_F`` of each, ``(...)``, not zero.
        seed: of the random columns, which are drawn on the CPU: the same on every device, so that devices agree to
            rounding.

    Attributes:
        front: the basis that was multiplied last.
        other: the basis of the other side.
        forward: whether the front is on the right, so that the last product was ``W @``.
        random_columns: how many columns of the start have matured: Note [Width of the block].
    """

    def __init__(self, W: Tensor | Matrix, scale: Tensor, seed: int) -> None:
        self.W = W
        self.inverse_scale = (1.0 / scale).to(W.dtype)[..., None, None]
        self._seed = seed
        self._draws = 0
        self.forward = False
        self._young: tuple[int, int] = (0, 0)

    @property
    def rank(self) -> int:
        """Triplets that the front gives."""
        return self.front.shape[-1]

    @property
    def young_columns(self) -> int:
        """Random columns that have joined and not matured."""
        return sum(self._young)

    @property
    def next_columns(self) -> int:
        """Columns of the block that the last pass computed."""
        return self._rest.shape[-1]

    @property
    def complete(self) -> bool:
        """Whether the triplets are the whole spectrum: one of the two bases is full, and nothing is unseen."""
        return any(basis.shape[-1] == basis.shape[-2] for basis in (self.front, self.other))

    def sketch(self, columns: int, known: Tensor | None = None) -> Tensor:
        """A random part of the column space: one pass over ``W``.

        Args:
            columns: how many.
            known: right directions from before, ``(..., n, r)``, which go first.

        Returns:
            ``W [known, Omega] (..., m, r + columns)``, not orthonormal.
        """
        random = self._gaussian(self.W.shape[-1], columns)
        return self._times(random if known is None else _beside(known, random))

    def start(self, block: Tensor) -> None:
        """Make the first core: two passes over ``W``.

        Args:
            block: left directions to begin with, ``(..., m, b)``.
        """
        self.front = orthonormal(block)
        self.other = block.new_zeros(*block.shape[:-2], self.W.shape[-1], 0)
        self.core = block.new_zeros(*block.shape[:-2], 0, block.shape[-1], dtype=torch.float64)
        self.random_columns = self._last = block.shape[-1]
        self._widths = ([self._last], list[int]())  # of the front's blocks, of the other side's
        self._multiply()
        self.expand(0)

    def ritz(self) -> Ritz:
        """Singular triplets of the matrix on the front, with bounds on their residuals.

        Returns:
            Values, residuals and coordinates.
        """
        last, new = self._last, self._gram_of_rest
        squared = self.core.mT @ self.core
        squared[..., -last:, -last:] += new
        squares, Y = eigh(squared)  # in float64: their spread is the square of the matrix's
        squares, Y = squares.flip(-1).clamp_min_(0), Y.flip(-1)
        tail = Y[..., -last:, :]
        outside = (tail * (new @ tail)).sum(-2).clamp_min_(_TINY)  # ||T y_last||^2
        slack = 4 * torch.finfo(self.core.dtype).eps * max(self.W.shape[-2:]) ** 0.5
        rest = (1.0 + slack - squares.sum(-1)).clamp_min_(slack)
        for bound in self._bounds_of_the_rest(squared):
            rest = torch.minimum(rest, bound)
        share = outside / torch.maximum(squares, outside)
        return Ritz(squares.sqrt_(), (share * rest[..., None]).sqrt_(), Y, rest.sqrt(), squared, new)

    def ceilings(self, ritz: Ritz, references: Mapping[int, float]) -> dict[int, list[float]]:
        r"""Upper bounds on the singular values of some matrices: Note [Ceilings] in :mod:`pss_param.certificate`.

        Args:
            ritz: the present Ritz triplets.
            references: by place in the batch; the bounds hold for values at and above, in scaled units.

        Returns:
            A bound for each Ritz value, descending; not of matrices of which the rest reaches up to the reference.
        """
        rests = [rest * rest for rest in ritz.rest.reshape(-1).tolist()] if references else []
        weights = {i: rests[i] / (c * c - rests[i]) for i, c in references.items() if c * c > rests[i]}
        if not weights:
            return {}
        chosen = list(weights)
        raised, new = (part.reshape(-1, *part.shape[-2:])[chosen] for part in (ritz.gram, ritz.gram_of_new))
        raised[:, -self._last :, -self._last :] += new.new_tensor(list(weights.values()))[:, None, None] * new
        values = eigvalsh(raised).flip(-1).clamp_min_(0).sqrt_()
        return dict(zip(chosen, values.tolist(), strict=True))

    def expand(self, fresh: int, room: int | None = None) -> None:
        """Let what the last pass found join the other side, and multiply it: one pass over ``W``.

        Args:
            fresh: new random columns beside it.
            room: the most columns that may join, at least one; ``None`` means no limit but the side's own.
        """
        length, held = self.other.shape[-2:]
        room = length - held if room is None else min(room, length - held)
        block, R = self._joined(fresh, room)
        zeros = R.new_zeros(*R.shape[:-1], self.core.shape[-1] - R.shape[-1])
        self.core = torch.cat([self.core, torch.cat([zeros, R], dim=-1)], dim=-2).mT
        self.front, self.other = _beside(self.other, block), self.front
        self._last = block.shape[-1]
        self._widths = (self._widths[1], self._widths[0])
        self._widths[0].append(self._last)
        self.forward = not self.forward
        self.random_columns += self._young[1]
        self._young = (max(0, block.shape[-1] - self._rest.shape[-1]), self._young[0])
        self._multiply()

    def triplets(self, ritz: Ritz, index: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Leading Ritz triplets of one matrix, in scaled units.

        Args:
            ritz: the present Ritz triplets.
            index: which matrix of the batch.
            count: how many triplets.

        Returns:
            ``U (m, count), S (count,), Vh (count, n)``.
        """
        S, Y = ritz.S.reshape(-1, ritz.S.shape[-1])[index], self._one(ritz.Y, index)
        bases = (self._one(part, index) for part in (self.core, self.other, self._rest, self.front))
        return self._triplets(S[:count], Y[:, :count], *bases)

    def all_triplets(self, ritz: Ritz, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Leading Ritz triplets of all matrices of a batch, in scaled units.

        Args:
            ritz: the present Ritz triplets.
            count: how many triplets of each.

        Returns:
            ``U (B, m, count), S (B, count), Vh (B, count, n)``.
        """
        return self._triplets(ritz.S[..., :count], ritz.Y[..., :count], self.core, self.other, self._rest, self.front)

    def _triplets(
        self, S: Tensor, Y: Tensor, core: Tensor, other: Tensor, rest: Tensor, front: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = torch.where(S[..., None, :] > 0, Y / S[..., None, :], torch.zeros_like(Y))
        image = _combined(other, core @ weights)
        image += _combined(rest, weights[..., -self._last :, :])
        on_front = _combined(front, Y)
        S = S.to(image.dtype)
        return (image, S, on_front.mT) if self.forward else (on_front, S, image.mT)

    def _bounds_of_the_rest(self, gram: Tensor) -> list[Tensor]:
        """``||E||^2`` as the newest blocks see it: Note [A residual without its pass]."""
        bounds = []
        for j in _NEWEST_BLOCKS:
            columns = sum(self._widths[0][-j:])
            if columns >= gram.shape[-1]:
                break
            seen = 2 + 2 * math.cos(math.pi / (j + 1)) + 2 * math.sqrt(columns / j / min(self.W.shape[-2:]))
            bounds.append(largest(gram[..., -columns:, -columns:]) * max(1.0, 4 / seen))
        return bounds

    @staticmethod
    def _one(batch: Tensor, index: int) -> Tensor:
        return batch[index] if batch.dim() > 2 else batch

    def _joined(self, fresh: int, room: int) -> tuple[Tensor, Tensor]:
        """An orthonormal block ``Q`` for the other side and ``R`` with ``T = Q R``."""
        T = self._rest
        if not fresh and room >= T.shape[-1]:
            found = factor(self._gram_of_rest, _NOISE * torch.finfo(T.dtype).eps)
            if found.fall > INDEPENDENT:
                return found.columns(T), found.R
        if room < T.shape[-1]:  # the side is full with less than T has columns; T's range has no more dimensions
            Q = torch.linalg.svd(T, full_matrices=False).U[..., :room]
        else:
            random = self._gaussian(T.shape[-2], min(fresh, room - T.shape[-1]))
            Q = orthonormal(_beside(T, random) if random.shape[-1] else T)
        outside = self._outside(Q)
        lost = torch.linalg.vector_norm(outside, dim=-2) < _SURVIVES
        if bool(lost.any()):  # what was left was rounding, and may lie anywhere: a new direction takes its place
            random = self._gaussian(*Q.shape[-2:])
            outside = self._outside(orthonormal(torch.where(lost[..., None, :], self._outside(random), outside)))
        Q = orthonormal(outside)  # twice is enough (Kahan)
        return Q, (Q.mT @ T).double()

    def _outside(self, block: Tensor) -> Tensor:
        return block - self.other @ (self.other.mT @ block)

    def _multiply(self) -> None:
        """One pass: the product with the front's last block, split into what the other side spans and the rest."""
        block = self.front[..., -self._last :]
        rest = self._times(block) if self.forward else self._times_t(block)
        known = rest.new_zeros(*rest.shape[:-2], 0, self._last)
        if self.other.shape[-1]:
            known = self._taken_out(rest)
            known += self._taken_out(rest)
        self._rest, self._gram_of_rest = rest, gram(rest)
        self.core = torch.cat([self.core[..., : self.core.shape[-1] - self._last], known.double()], dim=-1)

    def _taken_out(self, block: Tensor) -> Tensor:
        """Project a block out of the other side, in place; its coordinates there."""
        known: Tensor = self.other.mT @ block
        (block.addmm_ if block.dim() == 2 else block.baddbmm_)(self.other, known, alpha=-1)
        return known

    def _times(self, X: Tensor) -> Tensor:
        return times(self.W, X).mul_(self.inverse_scale)

    def _times_t(self, Y: Tensor) -> Tensor:
        return times_t(self.W, Y).mul_(self.inverse_scale)

    def _gaussian(self, rows: int, columns: int) -> Tensor:
        """One block shared by the batch, so that no result depends on what a matrix was batched with."""
        block = _drawn(self._seed + self._draws, rows, columns)
        self._draws += 1
        return block.to(self.W.device, self.W.dtype).expand(*self.W.shape[:-2], rows, columns)


def _beside(left: Tensor, right: Tensor) -> Tensor:
    """Columns beside columns, all contiguous."""
    return torch.cat([left.mT, right.mT], dim=-2).mT


def _combined(basis: Tensor, weights: Tensor) -> Tensor:
    """``basis @ weights`` for a few columns of float64 weights: from the left, where their number does not matter."""
    return (weights.mT.to(basis.dtype) @ basis.mT).mT


@lru_cache(maxsize=8)
def _drawn(seed: int, rows: int, columns: int) -> Tensor:
    """The same numbers for matrices of one shape, drawn once; nobody writes to them."""
    return torch.randn(columns, rows, generator=torch.Generator().manual_seed(seed), device="cpu").mT


_NOISE = 1e3  # rounding units of ||W||_F: what is left of a product may be nothing but its rounding
_TINY = 1e-300  # stands for a square of zero
_SURVIVES = 0.5  # of a unit column that is orthogonal but for rounding
