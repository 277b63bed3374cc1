# SPDX-License-Identifier: Apache-2.0
r"""A filtered block on the Gram matrix: for many dominant values that fall slowly, as in a trained weight.

``G = W^T W (n, n)`` of the smaller side costs as much as some ``n / 2`` columns of a pass over ``W``, and then ``G X``
replaces two passes. Where values crowd around the edge, that is where a thin iteration needs dozens of passes, this is
cheaper; and it opens a proof that thin products cannot give: Note [Nothing was missed].

Each round takes a block of Ritz vectors through a Chebyshev polynomial of ``G`` that is small on ``[0, a]``, ``a``
being the least Ritz value, and grows as fast as any above it; columns are scaled to unit length, orthonormalised, and
made Ritz vectors again. Their residuals are measured, not bounded.

# Note [Nothing was missed]
Let ``V (n, k)`` be the Ritz vectors taken, ``D > 0`` any weight, and ``x = (S[k] + delta)^2``. If

    A = x I - G + D V V^T

has a Cholesky factor, then ``G`` has at most ``k`` eigenvalues above ``x`` (a change of rank ``k`` moves at most ``k``
of them), and ``||W (I - V V^T)||^2 <= x``. So the true ``S[k]``, of which the Ritz value is a lower bound, lies within
``delta`` of it. Let ``c`` be the true value. Moving the edge of our own correction to ``c`` costs at most ``sqrt(k)
delta``. Our triplets are exact for ``W - U R^T``, whose other singular values are those of ``(I - U U^T) W (I - V
V^T)``: none exceeds ``sqrt(x) <= c + delta``, and at most ``k`` exceed ``c`` (interlacing). Hence, with ``R`` measured,

    error <= ||R||_F + 2 sqrt(k) delta + rounding,

without any appeal to probability. ``delta`` is chosen as what the tolerance leaves, so that one factorisation,
``n^3 / 3`` operations, says yes or no. Where it costs more than a round does, it waits until ``S[k]``, rising from
round to round, seems to be within ``delta`` of its place. The rounding of ``G`` in float32 is some ``eps S[0]^2`` and
is taken off ``x``.

References:
    Zhou, Saad, Tiago and Chelikowsky, "Chebyshev-filtered subspace iteration", J. Comput. Phys. 219 (2006);
    Sylvester's law of inertia, Golub and Van Loan, "Matrix Computations", 8.1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pss_param.blocks import orthonormal
from pss_param.certificate import Request, Spectrum, Verdict, count_of
from pss_param.definite import SMALL, positive_definite
from pss_param.found import Found
from pss_param.onednn import product
from pss_param.products import Panels, ThinProducts

_ROUNDS = 8
_DEGREES = (2, 8)  # of one round: beyond it the columns of a block that has not settled grow alike
WIDEST = 3
"""A block wider than this share of the matrix costs as much as its whole spectrum."""
_SLOWEST, _TINY = 0.9, 1e-30  # fall of the residuals in a round; what is divided by is no less
_AFTER_A_NO = 4  # degree where S[k] is farther from its place than it seemed
_DROWNED = 1e4  # of a column may be the rounding of the first ones, and leave digits enough to what it stands for
_EXTRA = 8  # columns beyond the wanted ones at the least, else half as many as are wanted
_LEAK = 0.8  # the share of the tolerance that the residuals may take; what they leave is for the edge
COARSE = 30.0
"""Values below so many square roots of the rounding unit, times S[0], have lost half of their digits in the square."""


class Block(NamedTuple):
    """Ritz vectors as rows, with ``G`` times them, of descending values.

    Attributes:
        rows: ``(b, n)``.
        image: ``rows @ G``.
        values: eigenvalues, ``(b,)``.
        lengths: norms of ``image - values * rows``.
    """

    rows: Tensor
    image: Tensor
    values: list[float]
    lengths: list[float]


def width_for(k: int) -> int:
    """Columns of a block that is to find so many triplets.

    Args:
        k: how many.

    Returns:
        ``k`` and half as many, eight at the least, beyond it.
    """
    return k + max(_EXTRA, k // 2)


def dominant_by_filter(W: Tensor, gram: Tensor, scale: Tensor, request: Request, start: Tensor) -> Found | None:
    """Dominant triplets of one tall matrix by filtering its Gram matrix.

    Args:
        W: ``(m, n)``.
        gram: ``W^T W / ||W||_F^2``.
        scale: ``||W||_F``.
        request: a rank, or ``floor(SR)``.
        start: right directions to begin with, ``(n, b)``: at best Ritz vectors, at worst ``G`` times Gaussian ones.

    Returns:
        The triplets with their certificate; ``None`` where too many are wanted, or the tolerance is out of reach.
    """
    block = _ritz(gram, orthonormal(start).mT)
    shape, eps = (W.shape[0], W.shape[1]), torch.finfo(W.dtype).eps
    before = None
    for left in reversed(range(_ROUNDS)):
        seen = _spectrum(block, shape, eps)
        k, decided = count_of(seen, request.rank)
        width = width_for(k)
        if (
            k == 0
            or width * WIDEST > shape[1]
            or seen.S[min(k, len(seen.S) - 1)] <= COARSE * math.sqrt(eps) * seen.S[0]  # zeros have no triplets
        ):
            return None
        if width > len(seen.S) + _EXTRA:
            block, before = _ritz(gram, orthonormal(_widened(gram, block, width)).mT), None
            continue
        look = _Look(seen, k, request.tol, _to_come(before, seen, k))
        verdict = _proved(gram, block, look, waits=left > 0 and shape[1] > SMALL) if decided else None
        if verdict is not None:
            return _found(W, block, seen, scale, verdict)
        degree = _degree(look, torch.finfo(gram.dtype).eps)
        block, before = _ritz(gram, orthonormal(_filtered(gram, block, degree).mT).mT), seen
    return None


class _Look(NamedTuple):
    """What a round has come to, for ``k`` triplets and a tolerance; ``S[k]`` may have ``to_come`` still to rise."""

    seen: Spectrum
    k: int
    tol: float
    to_come: float


def _ritz(gram: Tensor, rows: Tensor) -> Block:
    image = Panels(gram).behind(rows)
    values, Y = torch.linalg.eigh(product(image, rows.mT).double())
    Y = Y.flip(1).mT.to(rows.dtype)
    rows, image, values = product(Y, rows), product(Y, image), values.flip(0)
    lengths = torch.linalg.vector_norm(image - values.to(rows.dtype)[:, None] * rows, dim=1)
    numbers = torch.stack([values, lengths.double()]).tolist()
    return Block(rows, image, numbers[0], numbers[1])


def _spectrum(block: Block, shape: tuple[int, int], eps: float) -> Spectrum:
    """Singular values; ``||G v - s^2 v|| = s ||W^T u - s v||``."""
    S = [math.sqrt(max(value, 0.0)) for value in block.values]
    residual = [length / s if s > 0 else math.sqrt(length) for length, s in zip(block.lengths, S, strict=True)]
    return Spectrum(S, residual, shape, False, eps)


def _widened(gram: Tensor, block: Block, width: int) -> Tensor:
    """The block with new columns ``G Omega`` beside it; generated on the CPU, the same on every device."""
    missing, n = width - block.rows.shape[0], gram.shape[0]
    random = torch.randn(missing, n, generator=torch.Generator().manual_seed(width), device="cpu").to(gram)
    return torch.cat([block.rows, Panels(gram).behind(random)]).mT


def _degree(look: _Look, eps: float) -> int:
    """What brings the residuals to half of the tolerance, and ``S[k]`` to its place."""
    seen, k, tol, to_come = look
    if k >= len(seen.S) or seen.S[-1] <= 0:
        return _DEGREES[0]
    leak, edge = _leak(seen, k) + seen.rounding, _rate(seen, k)
    fits = leak <= _LEAK * tol
    too_far = to_come / _delta(tol - leak if fits else tol / 2, k)
    degree = max(
        math.log(max(2.0, 4 * leak / tol)) / _rate(seen, max(0, k - 1)),
        math.log(max(1.0, too_far)) / edge,
        _AFTER_A_NO if fits and too_far <= 1 else 0,
    )
    most = math.log(_DROWNED / eps) / max(_rate(seen, 0) - edge, _TINY)
    return max(_DEGREES[0], min(math.ceil(degree), int(most), _DEGREES[1]))


def _rate(seen: Spectrum, index: int) -> float:
    """By how much one degree raises a value over what is filtered out, in logarithms."""
    return math.acosh(2 * max(1 + 1e-3, (seen.S[index] / seen.S[-1]) ** 2) - 1)


def _delta(moved: float, k: int) -> float:
    """By how much the true ``S[k]`` may exceed its Ritz value."""
    return moved / (2 * math.sqrt(k))


def _filtered(gram: Tensor, block: Block, degree: int) -> Tensor:
    """``T_d(2 G / a - 1)`` of the rows, by the three-term recurrence; the first step is known."""
    top, arithmetic = block.values[0], torch.finfo(gram.dtype)
    a = max(block.values[-1], arithmetic.eps * top)  # below there is nothing but the rounding of the Gram matrix
    # Columns grow up to (4 top / a)^degree, whose square is to be finite.
    degree = min(degree, int(0.5 * math.log(arithmetic.max) / math.log(4 * top / a)))
    before, now = block.rows, torch.sub(block.image * (2 / a), block.rows)
    panels = Panels(gram)
    for _ in range(degree - 1):
        before, now = now, panels.behind(now, 4 / a).sub_(torch.add(before, now, alpha=2))
    unit: Tensor = now / torch.linalg.vector_norm(now, dim=1, keepdim=True)
    return unit


def _to_come(before: Spectrum | None, seen: Spectrum, k: int) -> float:
    """How much ``S[k]`` may still rise, if it goes on as it did, and slows down as the residuals fall."""
    if before is None or not 0 < k < min(len(seen.S), len(before.S)):
        return 0.0
    fall = min(_SLOWEST, _leak(seen, k) / max(_leak(before, k), _TINY))
    return (seen.S[k] - before.S[k]) * fall / (1 - fall)


def _leak(seen: Spectrum, k: int) -> float:
    return math.hypot(*seen.residual[:k])


def _proved(gram: Tensor, block: Block, look: _Look, waits: bool) -> Verdict | None:
    """The verdict of Note [Nothing was missed], if what the residuals leave of the tolerance is enough for it."""
    seen, k, tol, to_come = look
    leak = _leak(seen, k) + seen.rounding
    if k >= len(seen.S) or leak > _LEAK * tol:
        return None
    moved = 0.999 * (tol - leak)
    delta, rounding = _delta(moved, k), 8 * seen.eps * seen.S[0] ** 2
    x = (seen.S[k] + delta) ** 2 - rounding
    if (waits and to_come > delta) or x <= seen.S[k] ** 2:
        return None
    if not _at_most(gram, block.rows[:k], x, 2 * seen.S[0] ** 2):
        return None
    return Verdict(k, seen.S[k], math.nan, leak + moved, True)


def _at_most(gram: Tensor, rows: Tensor, x: float, weight: float) -> bool:
    A = product(rows.mT, weight * rows).sub_(gram)
    A.diagonal().add_(x)
    return positive_definite(A)


def _found(W: Tensor, block: Block, seen: Spectrum, scale: Tensor, verdict: Verdict) -> Found:
    Vh = block.rows[: verdict.k].to(W.dtype)
    image = ThinProducts(W).times(Vh.mT)
    length = torch.linalg.vector_norm(image, dim=0)
    residual = torch.tensor(seen.residual[: verdict.k], dtype=W.dtype, device=W.device)
    return Found(image / length, length / scale.to(W.dtype), Vh, residual, seen.S[0], verdict)
