# SPDX-License-Identifier: Apache-2.0
r"""The count of dominant values and the error of the smoothed matrix, from Ritz values and residuals.

Plain numbers of one matrix, scaled to ``||W||_F = 1``; nothing here touches a device.

# Note [What the certificate says]
Let ``h(s) = s - f(s)`` be what a smoothing takes from a singular value: zero up to the edge ``c`` and 1-Lipschitz
above it, so ``W* = W - h(W)``. Rayleigh-Ritz gives orthonormal ``U, V`` with ``W V = U S`` and ``R = W^T U - V S``
(or the same of the transpose), and a bound on the norm of each column of ``R``.
Then ``U, S, V`` are exact triplets of ``W - U R^T``, and a Lipschitz function of singular values is Lipschitz in the
Frobenius norm, so the error of the smoothed matrix is at most ``||R||_F``. A triplet near the edge converges last
but hardly moves: leaving triplets ``j+1 .. k`` out changes the correction by their ``h(s) <= s - c``, and so, for
every ``j``,

    error <= ||R[:j]||_F + 2 ||(S - c)[j:k]||_2 + ||(S + |R| - c)_+[k:]||_2 + sqrt(k) * |c - c_exact| + rounding,

where the third term is what Ritz values below the edge may hide, each having a true value within its own residual,
and of which the smallest over ``j`` is taken. The error of the edge obeys Weyl's bound ``||R[:k+1]||`` and the
quadratic one ``||R[:j]||^2 / (S[k] - S[j] - |R[j]|)`` (Mathias 1998); the smaller counts. Where the edge is ``S[k]``
and no level of its own, no term of the third exceeds that error: what is hidden are values of ``W`` without its first
``k`` triplets, the largest of which lies above ``S[k]`` by no more. That no direction above the
edge was missed altogether is certain only in probability: the start is Gaussian and wider than the wanted set (Note
[Width of the block] in :mod:`pss_param.krylov`), or a term is added for what a narrower one may not see (Note [Narrow
blocks] in :mod:`pss_param.narrow`).

# Note [Ceilings]
In the basis of Ritz vectors and their complement, ``W^T W = [[Theta, C^T], [C, M]]`` with ``Theta = diag(S^2)``. For
every ``x > ||M||``, as many eigenvalues lie above ``x`` as ``Theta + C^T (x - M)^-1 C - x`` has positive ones
(Sylvester), so the eigenvalues of ``Theta + C^T C / (c^2 - ||M||)`` bound those of ``W^T W`` from above wherever they
are at least ``c^2``. With the unseen rest ``E`` of Note [A residual without its pass] in :mod:`pss_param.krylov`,
``||M|| = ||E||^2``, and the coupling of a Ritz vector is ``E^T T y_last``, so that ``C^T C`` is at most ``||E||^2``
times the Gram matrix of ``T y_last``. Converged values are hardly moved by it: the bound is far sharper than the sums
of residuals above, and replaces ``|R|`` and the bounds of Weyl and Mathias where it is, once the residuals themselves
are within tolerance.

# Note [An integer stable rank]
``k`` copies of one value have ``SR = k`` exactly, and rounding must not decide between ``k`` and ``k - 1``. A stable
rank within 1e-4 (relative) below an integer counts as the integer, on every device alike, and the iteration goes on
until the interval that the residuals leave for SR is either inside one integer or narrower than half of that slack.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

STABLE_RANK_SLACK = 1e-4

OVERSAMPLING = 6
"""Random columns, and Ritz values, beyond the wanted ones (Halko et al. recommend 5 to 10)."""

_FAINT_BULK = 1e-3
"""Below this level (over ``||W||_F``) the bulk's energy is lost in the rounding of ``1 - sum(S^2)``."""


@dataclass(frozen=True)
class Request:
    """What to find: ``rank`` values, those above ``level``, those above the bulk, or else ``floor(SR)`` of them."""

    rank: int | None = None
    level: float | None = None
    bulk: bool = False
    tol: float = 1e-3


@dataclass(frozen=True)
class Spectrum:
    """What is known: Ritz values in descending order, their residuals, and where they come from.

    Attributes:
        S: values, descending.
        residual: ``||W^T u - s v||`` of each.
        shape: ``(m, n)``.
        complete: whether this is the whole spectrum.
        eps: rounding unit of the arithmetic.
        tail: ``(j, energy)``: exact squared norm of the matrix without its first ``j`` triplets, where it was
            measured.
    """

    S: Sequence[float]
    residual: Sequence[float]
    shape: tuple[int, int]
    complete: bool
    eps: float
    tail: tuple[int, float] | None = None
    ceilings: Sequence[float] | None = None

    @property
    def rounding(self) -> float:
        """Rounding of the products that everything is measured with: sums of many terms of random sign."""
        return 4 * self.eps * math.sqrt(max(self.shape))


@dataclass(frozen=True)
class Verdict:
    """What a spectrum amounts to.

    Attributes:
        k: number of dominant values.
        edge: the first value not taken; 0 where all were.
        bulk_edge: the Marchenko-Pastur edge where it was asked for, else NaN.
        error: bound on the error of the smoothed matrix.
        enough: whether to stop.
        faint: whether the bulk is so faint that its energy must be measured, not found by difference.
    """

    k: int
    edge: float
    bulk_edge: float
    error: float
    enough: bool
    faint: bool = False


def judge(seen: Spectrum, request: Request) -> Verdict:
    """Decide on ``k`` and on whether to stop.

    Args:
        seen: what is known of the matrix.
        request: what is wanted.

    Returns:
        The verdict; with a complete spectrum it always says enough.

    Example:
        >>> seen = Spectrum([0.8, 0.6, 0.0], [0.0, 0.0, 0.0], (3, 3), complete=True, eps=1e-7)
        >>> judge(seen, Request()).k
        1
    """
    bulk_edge = bulk_level(seen) if request.bulk else math.nan
    if not seen.S or seen.S[0] <= 0:
        return Verdict(0, 0.0, 0.0 if request.bulk else math.nan, 0.0, True)
    if request.rank == 0:
        error = value_error(seen, 0) / seen.S[0]
        return Verdict(0, seen.S[0], bulk_edge, error, seen.complete or error <= request.tol)
    if request.bulk or request.level is not None:
        return _judge_level(seen, request, bulk_edge)
    return _judge_count(seen, request)


def _judge_level(seen: Spectrum, request: Request, bulk_edge: float) -> Verdict:
    level = bulk_edge if request.level is None else request.level
    k = sum(s > level for s in seen.S)
    error = _correction_error(seen, level, k)
    faint = False
    if request.bulk:
        m, n = seen.shape
        taken = sum(r * r for r in seen.residual[:k])
        error += math.sqrt(k) * _bulk_factor(m, n) * taken / (2 * max(level, seen.eps))
        faint = not seen.complete and seen.tail is None and level < _FAINT_BULK
    known = k <= len(seen.S) - OVERSAMPLING and not faint
    edge = seen.S[k] if k < len(seen.S) else 0.0
    return Verdict(k, edge, bulk_edge, error, seen.complete or (known and error <= request.tol), faint)


def _judge_count(seen: Spectrum, request: Request) -> Verdict:
    k, decided = count_of(seen, request.rank)
    if k >= len(seen.S):
        edge = 0.0
        error = _correction_error(seen, edge, len(seen.S)) if seen.complete else math.inf
        return Verdict(min(k, len(seen.S)) if seen.complete else k, edge, math.nan, error, seen.complete)
    off = value_error(seen, k) if k else 0.0
    error = _correction_error(seen, seen.S[k], k, off) + math.sqrt(k) * off if k else 0.0
    return Verdict(k, seen.S[k], math.nan, error, seen.complete or (decided and error <= request.tol))


def count_of(seen: Spectrum, rank: int | None) -> tuple[int, bool]:
    """How many values are dominant: Note [An integer stable rank].

    Args:
        seen: what is known of the matrix.
        rank: how many were asked for; ``None`` means ``floor(SR)``.

    Returns:
        ``k``, and whether the interval of the stable rank leaves no choice.
    """
    least = min(seen.shape)
    if rank is not None:
        return min(rank, least), True
    high, low = (stable_rank_of(top) for top in (seen.S[0], seen.S[0] + value_error(seen, 0)))
    slack = 1 + STABLE_RANK_SLACK
    k_high, k_low = math.floor(high * slack), math.floor(low * slack)
    decided = k_high == k_low or high - low <= 0.5 * STABLE_RANK_SLACK * high or k_low >= least - 1
    return min(k_high, least - 1), decided


def rank_wanted(top: float, request: Request) -> int:
    """How many values a request is about, as far as the largest one tells.

    Args:
        top: ``S[0] / ||W||_F``.
        request: what is wanted.

    Returns:
        ``request.rank``, or else ``floor(SR)``.
    """
    return math.floor(stable_rank_of(top)) if request.rank is None else request.rank


def by_count(requests: list[Request]) -> bool:
    """Whether all requests are for a number of values, not for what lies above a level.

    Args:
        requests: of a batch.

    Returns:
        The answer.
    """
    return all(request.level is None and not request.bulk for request in requests)


def stable_rank_of(top: float) -> float:
    """Stable rank of a matrix with ``||W||_F = 1`` and largest singular value ``top``.

    Args:
        top: ``S[0] / ||W||_F``.

    Returns:
        ``1 / top^2``, at least 1; 0 for the zero matrix.
    """
    return max(1.0, 1.0 / (top * top)) if top > 0 else 0.0


def value_error(seen: Spectrum, index: int) -> float:
    """Bound on how far ``S[index]`` is below the true value: the ceiling's, or Weyl's and the quadratic one.

    Args:
        seen: what is known of the matrix.
        index: which value.

    Returns:
        The bound.
    """
    if seen.ceilings is not None:
        return max(0.0, seen.ceilings[index] - seen.S[index])
    energy = sum(r * r for r in seen.residual[: index + 1])
    best, value = math.sqrt(energy), seen.S[index]
    for s, r in zip(seen.S[index + 1 :], seen.residual[index + 1 :], strict=True):
        if energy >= best * value:
            break  # no gap is wider than the value itself
        gap = value - s - r  # to the most that the first value outside the leading set can be
        if gap > 0:
            best = min(best, energy / gap)
        energy += r * r
    return best


def _correction_error(seen: Spectrum, level: float, k: int, most: float = math.inf) -> float:
    """The bound of Note [What the certificate says] without the edge's own error, ``most``."""
    highest = seen.ceilings[k:] if seen.ceilings is not None else map(operator.add, seen.S[k:], seen.residual[k:])
    hidden = math.hypot(*(min(value - level, most) for value in highest if value > level))
    return leak(seen, level, k) + hidden + seen.rounding


def leak(seen: Spectrum, level: float, k: int) -> float:
    """The part of the bound that the residuals of the taken triplets make up.

    Args:
        seen: what is known of the matrix.
        level: the edge.
        k: how many triplets are taken.

    Returns:
        ``min_j ||R[:j]||_F + 2 ||(S - c)[j:k]||_2``.
    """
    leaks = accumulate((r * r for r in seen.residual[:k]), initial=0.0)
    moves = list(accumulate((max(0.0, s - level) ** 2 for s in reversed(seen.S[:k])), initial=0.0))
    return min(math.sqrt(x) + 2 * math.sqrt(y) for x, y in zip(leaks, reversed(moves), strict=True))


def _bulk_factor(m: int, n: int) -> float:
    return (math.sqrt(m) + math.sqrt(n)) ** 2 / (m * n)


def bulk_level(seen: Spectrum) -> float:
    r"""Largest fixed point of ``c = (sqrt(m) + sqrt(n)) * rms(S clipped at c)`` for ``||W||_F = 1``.

    With ``j`` values clipped, :math:`c^2 (1 - j a) = a (1 - \sum_{i<j} s_i^2)`, :math:`a = (\sqrt m + \sqrt n)^2 /
    (m n)`; the first ``j`` for which exactly ``j`` values exceed ``c`` belongs to the largest fixed point. Values
    that are not known yet are taken as unclipped: the level of a partial spectrum is an upper bound, exact once it
    lies above its last value.

    Args:
        seen: leading singular values.

    Returns:
        The level; zero where the clipping never comes to rest, that is where there is no bulk.

    Example:
        >>> flat = Spectrum([0.5] * 4, [0.0] * 4, (4, 4), complete=True, eps=1e-7)
        >>> bulk_level(flat)
        1.0
    """
    a, floor = _bulk_factor(*seen.shape), min(seen.shape) * seen.eps * (seen.S[0] if seen.S else 0.0)
    tails = _tail_energies(seen, floor)
    for j, tail in enumerate(tails):
        if j * a >= 1:
            break
        level = math.sqrt(a * tail / (1 - j * a))
        if (seen.S[j] if j < len(seen.S) else 0.0) <= level and level > floor:
            return level
    return 0.0


def _tail_energies(seen: Spectrum, floor: float) -> list[float]:
    """Squared norm of what is left after the first ``j`` values; values below ``floor`` are rounding."""
    if seen.tail is not None or seen.complete:
        at, energy = seen.tail if seen.tail is not None else (len(seen.S), 0.0)
        real = [s * s if s > floor else 0.0 for s in seen.S[:at]]
        return list(reversed(list(accumulate(reversed(real), initial=energy))))
    left, tails = 1.0, [1.0]
    for s in seen.S:
        left = max(0.0, left - s * s)
        tails.append(left)
    return tails
