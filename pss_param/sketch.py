# SPDX-License-Identifier: Apache-2.0
r"""The first block of an iteration: a sketch no wider than what is wanted asks for.

# Note [Stale directions]
A start with ``r`` known directions makes every block as wide as these. If they are as good as the tolerance asks for,
two passes show it; if not, a start without them is narrower, or soon leads to a Gram matrix. What ``W^T W`` makes of
eight mixtures of known directions outside of their span tells which. Of 2048 x 2048 with 50 to 68 dominant values,
moved by 1e-4 to 0.1 of its norm and asked for 1e-2 to 1e-4, a start with them took 0.07 to 0.35 of the time of one
without where that drift was up to 0.3 of the tolerance, but for two of 1.1, and 1.02 to 2.2 from 0.4 on, but for
``S ~ j^-0.3``, which took 0.3 to 0.8 up to 4. With 10 or less a block has 16 columns at most.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from pss_param.blocks import gram, orthonormal
from pss_param.certificate import OVERSAMPLING, Request, by_count, rank_wanted
from pss_param.eigen import largest, largest_and_trace
from pss_param.krylov import Krylov, beside
from pss_param.narrow import stays_narrow
from pss_param.products import FULL_WIDTH, on_gpu

__all__ = ["BLOCKS_THAT_PAY", "FirstBlock", "first_block", "is_stale", "narrowed", "starts_left", "tiles"]

BLOCKS_THAT_PAY = 8
"""An iteration takes about four blocks to show that it has converged. Where twice as many would fill the smaller side,
the whole spectrum costs less than the small eigenvalue problems on the way."""

_HALF_A_TILE = 8
"""Columns that are enough for one or two values where depth counts more than width: in a bulk, on a CPU, where a pass
with twice as many takes up to twice the time, and otherwise if the tolerance is loose or the matrix small."""

_SMALL = 1 << 18
"""Elements of a matrix up to which a pass with twice the columns, and what follows it, takes twice the time."""

_LOOSE = 5e-3

_FRESH = 0.35  # of the tolerance


def starts_left(requests: list[Request], init: Tensor | None) -> bool:
    """Whether to start from left directions, which say more of what is unseen: of known ones, and behind a level.

    Args:
        requests: what is wanted of each matrix.
        init: right directions known from before.

    Returns:
        The answer.
    """
    return init is not None or not by_count(requests)


def is_stale(krylov: Krylov, requests: list[Request], init: Tensor) -> bool:
    """Whether a start without known directions costs less than one with them: Note [Stale directions].

    Args:
        krylov: the iteration that is to start, with a single matrix.
        requests: what is wanted of it.
        init: right directions known from before.

    Returns:
        The answer.
    """
    wide = init.shape[-1] + OVERSAMPLING > FULL_WIDTH and by_count(requests)
    return wide and not on_gpu(init) and krylov.drift(init) > _FRESH * min(request.tol for request in requests)


class FirstBlock(NamedTuple):
    """What an iteration begins with.

    Attributes:
        block: ``(..., n, b)``.
        squares: its Gram matrix, where it was needed.
        spare: columns of the sketch that seem not to be needed, on a CPU.
    """

    block: Tensor
    squares: Tensor | None = None
    spare: Tensor | None = None


def first_block(krylov: Krylov, requests: list[Request], init: Tensor | None) -> FirstBlock:
    """A sketch as wide as the stable rank asks for, or as one that stays narrow may be; beside what is known already.

    Args:
        krylov: the iteration that is to start.
        requests: what is wanted of each matrix.
        init: right directions known from before.

    Returns:
        The block.
    """
    least = min(krylov.W.shape[-2:])
    wanted = max((request.rank or 0) + OVERSAMPLING for request in requests)
    if init is not None:
        known = init.shape[-1]
        return FirstBlock(krylov.left_sketch(min(tiles(known + OVERSAMPLING), least) - known, init))
    sketch = krylov.left_sketch if starts_left(requests, init) else krylov.right_sketch
    most = FULL_WIDTH if stays_narrow(krylov, requests) else least
    if all(request.rank is not None for request in requests):
        norm_alone = all(request.rank == 0 for request in requests)  # which may be that of a flat matrix
        return FirstBlock(sketch(min(least, _HALF_A_TILE if norm_alone else min(most, tiles(wanted)))))
    small = math.prod(krylov.W.shape) <= _SMALL
    on_cpu = isinstance(krylov.W, Tensor) and not on_gpu(krylov.W)
    block = sketch(min(least, _HALF_A_TILE if small else FULL_WIDTH))
    while True:  # by doubling: a narrow sketch may be unlucky with the top direction, and a wider one sees further
        held, squares = block.shape[-1], gram(block)
        wanted = _guess(squares) + OVERSAMPLING
        deep = on_cpu or small or not by_count(requests) or all(request.tol >= _LOOSE for request in requests)
        best = _HALF_A_TILE if deep and wanted <= _HALF_A_TILE else tiles(wanted)
        columns = min(best, 2 * held, least // BLOCKS_THAT_PAY, most)
        if columns <= held:
            held = min(held, best)
            return FirstBlock(block[..., :held], squares[..., :held, :held], block[..., held:] if on_cpu else None)
        block = beside(block, sketch(columns - held))


def narrowed(krylov: Krylov, block: Tensor, requests: list[Request], left: bool) -> int:
    """No more columns of a sketch than are needed, as two more passes tell: Note [Many matrices on a GPU].

    Args:
        krylov: the iteration that is to start.
        block: the sketch.
        requests: what is wanted of each matrix.
        left: whether it is of left directions.

    Returns:
        How many columns of it to keep.
    """
    first, second = (krylov.back, krylov.forth) if left else (krylov.forth, krylov.back)
    tops = largest(gram(second(orthonormal(first(orthonormal(block)))))).sqrt().tolist()
    ranks = [rank_wanted(top, request) for top, request in zip(tops, requests, strict=True)]
    return min(block.shape[-1], tiles(max(ranks) + OVERSAMPLING))


def tiles(columns: int) -> int:
    """The next width at which a column costs the least: Note [Which kernel] in ``products``.

    Args:
        columns: how many are needed.

    Returns:
        As many or more.
    """
    return math.ceil(columns / FULL_WIDTH) * FULL_WIDTH


def _guess(squares: Tensor) -> int:
    """A stable rank from the Gram matrix ``(..., b, b)`` of a sketch ``Z = W Omega``: the largest of the batch."""
    # The Gram matrix of Z has the identity as its mean. A dominant direction, of a share p = 1 / SR of the energy, adds
    # to its largest eigenvalue about b p, scattered like chi^2 of b; the others share what is left of the energy.
    # So p is b - 1 parts of the largest one's share of the trace, and also what the mean of the others lacks to one.
    # Their average is right within a factor of two up to a stable rank of b / 2, and low beyond b.
    b = squares.shape[-1]
    known = largest_and_trace(squares)  # nothing of a matrix of zeros
    parts = min((b * top / (trace or 1.0) + top - trace + b - 2) / 2 for top, trace in known)
    return math.floor((b - 1) / max(parts, 0.05))
