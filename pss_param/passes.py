# SPDX-License-Identifier: Apache-2.0
r"""How many passes an iteration makes before it looks at what they brought.

# Note [Passes without a look]
A look at a core of 48 columns costs as much as two passes over 512 x 512 and half of one over 2048 x 2048, so it waits
until it may succeed. Two passes over a matrix raise what is wanted over the value ``a`` that the block ends with by
``e^g``, ``g = acosh(2 c^2 / a^2 - 1)`` for the edge ``c``. The first block tells both, if roughly, and

    x = 2 log(1 / tol) / g

passes behind it lead to the tolerance. Where ``g`` is below 4 in a block of 16 columns or more, the values fall so
slowly that the first block is no measure of the next ones: they start a pass behind, and gain twice as fast
(``2.4 + 0.55 x``, fitted to ``j^-0.4`` to ``j^-0.6``). A block of 8 columns is one that a few values stand far above,
so that the tolerance alone tells enough, but for those in the middle. Of 186 first looks (eight power laws and four
spiked bulks of 512 x 512 to 2048 x 2048, at 1e-2 to 1e-4, two seeds) 108 were the first that could succeed, and 174
within a pass of it.

After a look that failed the bound falls at half of the rate per pass that the gap tells for two, and soon at twice
that, as every block leaves more directions behind: where the gap asked for y pairs of passes behind two blocks it took
2 y single ones up to 4 of them, then y + 2, and behind more blocks y. Later on the last fall of the bound itself tells
more.

Behind a level there may be a bulk that reaches up to it, and no gap. What the bulk may hide is told far better while
both sides hold equally many blocks, so looks at it start with the first block and are a multiple of two passes apart.

# Note [Crowded edges]
The Gram matrix and its factorisation cost about ``n / 2.5`` columns of a pass, and ``e^7`` is the growth that a
certificate takes. Passes times columns over ``n`` come out as 0.8 to 1 for trained weights (512 x 512 to 2048 x 2048)
and as 0.02 to 0.2 for ``S ~ j^-0.5`` and collapsed ones; above 0.4 the Gram matrix takes over, or a narrow block
(:mod:`pss_param.narrow`). A block that turns out to be too narrow is judged by the one that it will have to be: not by
its own last values, among which the edge is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pss_param.products import FULL_WIDTH

__all__ = [
    "after_first_look",
    "after_later_look",
    "before_first_look",
    "crowded",
    "first_look_of_narrow",
    "growth",
    "growth_beyond",
]

_GROWTH = 7.0
_PASS_OVER_GRAM = 2.5
_UNSETTLED, _STEEPEST = 0.75, 16.0  # of a growth that values tell which are too low yet; exponent of a power

_TIGHT, _LOOSE = 3e-4, 3e-3  # of a narrow block: 1/j and collapsed matrices need the same number of passes beyond these
_SLACK = 0.1  # of a pass: a failed look costs less than a pass too many
_RIPE = 4.0
_UNRIPE, _FROM, _SHARE = 1.0, 2.4, 0.55
_LEAST_UNSEEN, _MOST_UNSEEN = 2, 10  # one block more shows nothing but a matrix of low rank

_LONGEST_FIRST, _LONGEST_LEAP = 8, 4
_YOUNG = 2  # blocks
_SLOW, _LOST = 0.75, 1.7
_SPARE, _SPARE_OF_SMALL = 0.3, 0.8  # added before rounding down: below the size of 1024 a failed look costs the most
_LOOKS_COST_LESS = 1024
_LEAP = 0.5


def growth(values: Sequence[Sequence[float]], ranks: Sequence[int], columns: int) -> float:
    """By how much two passes raise what is wanted over what is not.

    Args:
        values: Ritz values of each matrix of a batch, descending.
        ranks: how many are wanted of each.
        columns: of a block.

    Returns:
        The exponent; the least of the batch.

    Example:
        >>> round(growth([[1.0, 0.5, 0.1]], [1], 3), 2)
        4.58
    """
    least = math.inf
    for S, k in zip(values, ranks, strict=True):
        last = min(columns, len(S)) - 1
        ratio = (S[min(k, last)] / max(S[last], 1e-30)) ** 2
        least = min(least, math.acosh(max(2 * ratio - 1, 1 + 1e-6)))
    return least


def growth_beyond(values: Sequence[Sequence[float]], ranks: Sequence[int], columns: int) -> float:
    """The same for a block wider than the present one, of which only the first values are right.

    Args:
        values: Ritz values of each matrix of a batch, descending.
        ranks: how many are wanted of each.
        columns: of the wider block.

    Returns:
        The exponent, if the values go on falling as a power, less what those near the edge are too low; the least of
        the batch.

    Example:
        >>> round(growth_beyond([[1 / j for j in range(1, 9)]], [4], 16), 2)
        2.75
    """
    least = math.inf
    for S, k in zip(values, ranks, strict=True):
        edge, before = min(k, len(S) - 1), min(k, len(S) - 1) // 2
        fall = math.log(max(S[before], 1e-30) / max(S[edge], 1e-30))
        slope = min(_STEEPEST, fall / math.log((edge + 1) / (before + 1))) if edge else 0.0
        ratio = max(1.0, columns / (edge + 1)) ** (2 * slope)
        least = min(least, _UNSETTLED * math.acosh(max(2 * ratio - 1, 1 + 1e-6)))
    return least


def crowded(grows: float, columns: int, least: int) -> bool:
    """Whether the Gram matrix costs less than the passes that are needed: Note [Crowded edges].

    Args:
        grows: what :func:`growth` told.
        columns: of a block.
        least: smaller side of the matrices.

    Returns:
        The answer.
    """
    return 2 * _GROWTH / grows * columns * _PASS_OVER_GRAM > least


def first_look_of_narrow(tol: float) -> int | None:
    """Passes behind a first block that is narrow, where the tolerance alone tells them well enough.

    Args:
        tol: what has to be reached.

    Returns:
        At least two; ``None`` where it saves time to ask the values.

    Example:
        >>> [first_look_of_narrow(tol) for tol in (1e-2, 1e-3, 1e-4)]
        [2, None, 3]
    """
    return 2 if tol > _LOOSE else 3 if tol < _TIGHT else None


def before_first_look(grows: float, tol: float, columns: int, least: int) -> int:
    """Passes behind the first block.

    Args:
        grows: what :func:`growth` told of the first block.
        tol: what has to be reached.
        columns: of the block.
        least: smaller side of the matrices.

    Returns:
        At least two, and no more where the Gram matrix is likely to take over.

    Example:
        >>> before_first_look(8.6, 1e-2, 8, 512), before_first_look(2.1, 1e-3, 16, 512)
        (2, 7)
    """
    if crowded(grows, columns, least):
        return _LEAST_UNSEEN
    asked = 2 * math.log(1 / tol) / grows
    unripe = grows < _RIPE and columns >= FULL_WIDTH
    asked = min(asked + _UNRIPE, _FROM + _SHARE * asked) if unripe else asked - _SLACK
    return max(_LEAST_UNSEEN, min(_MOST_UNSEEN, math.ceil(asked)))


def after_first_look(grows: float, worst: float, least: int, blocks: int) -> int:
    """Passes behind the first look.

    Args:
        grows: what :func:`growth` tells.
        worst: the bound over the tolerance.
        least: smaller side of the matrices.
        blocks: how many the basis has.

    Returns:
        At least one.
    """
    if not 1 < worst < math.inf:
        return 1
    asked = math.log(worst) / grows
    if blocks > _YOUNG:
        return min(_LONGEST_FIRST, math.ceil(asked))
    spare = _SPARE_OF_SMALL if least < _LOOKS_COST_LESS else _SPARE
    return max(1, min(_LONGEST_FIRST, math.floor(asked + min(_SLOW * asked, _LOST) + spare)))


def after_later_look(worst: float, before: float, passes: int) -> int:
    """Passes behind a later look, from the bound over the tolerance.

    Args:
        worst: now.
        before: at the look before.
        passes: between the two.

    Returns:
        At least one.
    """
    if not 1 < worst < before < math.inf:
        return 1
    return max(1, min(_LONGEST_LEAP, math.floor(_LEAP * passes * math.log(worst) / math.log(before / worst))))
