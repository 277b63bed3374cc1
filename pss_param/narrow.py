# SPDX-License-Identifier: Apache-2.0
r"""Many dominant values by a block that is narrower than their number.

# Note [Narrow blocks]
A block as wide as what is wanted sees every repeated value as often as it occurs (Note [Width of the block] in
:mod:`pss_param.krylov`), but its passes bring many columns that are nearly alike. A narrow block that goes on for
longer finds ``k`` triplets of trained weights in a basis of 5 to 6 ``k`` columns, by passes that take the same time
whatever ``k`` is. So a single large matrix of a CPU keeps a block of 16 columns where more are wanted, or where values
crowd around the edge: 4096 x 4096 with 92 dominant values takes 0.31 s by it, and 0.55 by the Gram matrix.

What such a block may miss are copies. Of a value that more directions share than it has random columns ``b`` it sees
``b``; of values that differ by a share ``d`` of themselves more come out later, when the residuals of those that are
there are some ``d`` times as large as the values. Hidden copies betray themselves: ``b`` Ritz values lie close
together. Where they are within 1 % of each other, or within 10 % and have residuals above 0.15 ``d``, and their largest
``t`` is above the edge ``c``, the bound counts ``b`` hidden ones at ``t``: they would have been lowered by ``t - c``
each, and the edge may be as high as ``t`` itself, so that

    error <= ... + (sqrt(b) + sqrt(k)) (t - c).

Residuals fall, equal values stay equal: where their term exceeds half of the tolerance, the Gram matrix takes over,
whose proof needs no luck. Of 5,800 random matrices with clusters of 10 to 60 values, 1e-9 to 0.3 of themselves wide,
with the edge below and inside of them, none exceeded its bound (worst 0.63 of it); without the term 4 of 435 did, by up
to 127 times, and with that of 1 % alone 1 of 4,600, by 2.4 times.

A look is one at the right subspace, whose residuals the last pass has measured. The left one is half a step ahead, but
all that is known of its residuals is a bound by ``||E||``, which inside of a bulk is some four times what they are.

# Note [How far a narrow block has to go]
Two passes raise what is wanted over what lies a block's width behind it by ``e^g``, ``g = acosh(2 (S[k] / S[k + b])^2 -
1)``; where values crowd the bound reached the tolerance after some ``8.5 + log(1e-2 / tol) / 2`` over ``g`` blocks
(trained weights, power laws, spikes over a bulk with the edge inside of it, 1024 x 1024 and 2048 x 2048). Early Ritz
values are too far apart, so this says too little at first. A basis costs about the square of its columns, and as much
as the Gram matrix at a quarter of the smaller side; where what is left of that would cost more, Gram matrices serve.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from pss_param.certificate import Request, Verdict, by_count
from pss_param.core import Ritz
from pss_param.krylov import Krylov
from pss_param.looks import verdicts_of
from pss_param.products import on_gpu

__all__ = ["deepen", "hidden", "reaches", "stays_narrow"]

_LARGE = 1536  # at 1024 a Gram matrix takes 0.5 to 1.4 of the time
_COLUMNS_OF_ONE, _COLUMNS_OF_NONE = 4, 128  # of a basis that may do
_GRAM = 0.75  # of the widest basis costs as much as a Gram matrix with a start from the basis so far
_FIRST_LOOK = 3  # columns of the basis to each value
_ALIKE, _SIMILAR, _CONVERGED = 0.01, 0.1, 0.15  # of a value; the last over how far values are apart
_BLOCKS, _BLOCKS_OF_A_DIGIT, _EASY = 8.5, 0.5, 1e-2
_HOPELESS = 2
_LEAP, _FIRST_LEAP, _LONGEST_LEAP = 0.5, 3, 2  # the number of blocks over the last two are the most at once


class _Look(NamedTuple):
    """What a basis holds, and what that amounts to."""

    ritz: Ritz
    verdict: Verdict


class _Fall(NamedTuple):
    """The bound over the tolerance, now and at the look before, and the passes between the two."""

    worst: float
    before: float
    passes: int


def stays_narrow(krylov: Krylov, requests: list[Request]) -> bool:
    """Whether a block need not be as wide as what is wanted.

    Args:
        krylov: the iteration.
        requests: what is wanted of each matrix.

    Returns:
        The answer: for a single large matrix of a CPU of which values are counted.
    """
    large = min(krylov.W.shape[-2:]) >= _LARGE
    return (
        large and isinstance(krylov.W, Tensor) and krylov.W.dim() == 2 and not on_gpu(krylov.W) and by_count(requests)
    )


def reaches(krylov: Krylov, k: int, widest: int, requests: list[Request]) -> bool:
    """Whether a narrow block that starts anew may find so many values before the Gram matrix would.

    Args:
        krylov: an iteration with the same matrices.
        k: how many.
        widest: columns of a basis that costs no more than the Gram matrix.
        requests: what is wanted of each matrix.

    Returns:
        The answer.
    """
    return stays_narrow(krylov, requests) and _fits(k, widest)


def deepen(krylov: Krylov, request: Request, widest: int, seen: tuple[Ritz, Verdict]) -> tuple[Ritz, Verdict | None]:
    """Go on with a block that is narrower than what is wanted: Note [Narrow blocks].

    Args:
        krylov: the iteration of a single matrix.
        request: what is wanted of it.
        widest: columns of a basis that costs no more than the Gram matrix.
        seen: the last look and what it amounts to.

    Returns:
        The last look, and the verdict; ``None`` where the Gram matrix has to do it.
    """
    look, before, passes = _look(krylov, request, *seen), math.inf, 0
    while not look.verdict.enough:
        if _is_far(krylov, look, request.tol, widest):
            return look.ritz, None
        worst, early = look.verdict.error / request.tol, _is_early(krylov, look)
        room = 2 * max(1, (widest - krylov.rank) // krylov.next_columns)
        passes = min(room, _passes(krylov, look.verdict.k, _Fall(worst, before, passes)))
        before = math.inf if early else worst
        look = _later(krylov, request, passes)
    return look


def _look(krylov: Krylov, request: Request, ritz: Ritz, verdict: Verdict) -> _Look:
    if krylov.complete or not verdict.enough:
        return _Look(ritz, verdict)
    error = verdict.error + hidden(ritz, verdict, krylov.random_columns, _SIMILAR)
    return _Look(ritz, replace(verdict, error=error, enough=error <= request.tol))


def hidden(ritz: Ritz, verdict: Verdict, columns: int, alike: float) -> float:
    """What copies may add to the error that are more than a block has random columns.

    Args:
        ritz: what is known of a single matrix.
        verdict: what that amounts to.
        columns: of the block, random ones.
        alike: share of themselves by which values differ that may stand for more; those that differ by more than 1 %
            only as long as they have not converged.

    Returns:
        The last term of Note [Narrow blocks].
    """
    S, residual, k = ritz.S[0], ritz.residual[0], verdict.k
    top = 0.0
    for i in range(min(k, len(S) - columns + 1)):
        if S[i] <= verdict.edge:
            break
        apart = 1 - S[i + columns - 1] / S[i]
        open_yet = max(residual[i : min(i + columns, k + 1)]) > _CONVERGED * apart * S[i]
        if apart < _ALIKE or (apart < alike and open_yet):
            top = max(top, S[i])
    return (math.sqrt(columns) + math.sqrt(k)) * max(0.0, top - verdict.edge)


def _later(krylov: Krylov, request: Request, passes: int) -> _Look:
    for _ in range(passes if krylov.reached else passes + 1):
        if not krylov.complete:
            krylov.advance()
    ritz = krylov.right_ritz() if krylov.reached else krylov.ritz()
    return _look(krylov, request, ritz, verdicts_of(krylov, ritz, [request])[0])


def _fits(k: int, widest: int) -> bool:
    return _COLUMNS_OF_ONE * k + _COLUMNS_OF_NONE <= widest


def _is_early(krylov: Krylov, look: _Look) -> bool:
    return krylov.rank < _FIRST_LOOK * look.verdict.k


def _is_far(krylov: Krylov, look: _Look, tol: float, widest: int) -> bool:
    """Whether the Gram matrix costs less than what is to come."""
    k = look.verdict.k
    if krylov.rank >= widest or not _fits(k, widest):
        return True
    if _is_early(krylov, look):
        return False
    alike = hidden(look.ritz, look.verdict, krylov.random_columns, _ALIKE)
    if look.verdict.error - alike <= tol < _HOPELESS * alike or look.verdict.error == math.inf:
        return True
    to_come = _columns_to_come(look.ritz.S[0], k, krylov.next_columns, tol)
    return to_come**2 - krylov.rank**2 > (_GRAM * widest) ** 2


def _columns_to_come(S: list[float], k: int, columns: int, tol: float) -> float:
    """Of the basis that will do: Note [How far a narrow block has to go]."""
    behind = min(k + columns, len(S) - 1)
    if behind <= k:
        return 0.0
    fall = 2 * columns / (behind - k) * math.log(max(S[k], 1e-30) / max(S[behind], 1e-30))
    grows = math.acosh(max(2 * math.exp(min(fall, 50.0)) - 1, 1 + 1e-6))
    return columns * (_BLOCKS + _BLOCKS_OF_A_DIGIT * math.log(_EASY / tol)) / grows


def _passes(krylov: Krylov, k: int, fall: _Fall) -> int:
    """An even number until the next look, which costs as much as two of them and more as the basis grows."""
    columns, blocks = krylov.next_columns, len(krylov.core.widths)
    short = _FIRST_LOOK * k - krylov.rank
    if short > 0:
        return 2 * math.ceil(short / columns)
    if fall.before == math.inf:
        return 2 * max(1, blocks // _FIRST_LEAP)
    if not 1 < fall.worst < fall.before:
        return 2
    asked = _LEAP * fall.passes * math.log(fall.worst) / math.log(fall.before / fall.worst)
    return 2 * max(1, min(round(asked / 2), blocks // _LONGEST_LEAP))
