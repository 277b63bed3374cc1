# SPDX-License-Identifier: Apache-2.0
r"""Dominant triplets of a batch of matrices: which algorithm serves which matrix.

# Note [Which algorithm serves which matrix]
1. The block iteration of :mod:`pss_param.krylov` serves matrices of which a few values are wanted that stand apart from
   the rest, whatever their size. A narrow sketch says how wide the block should be, the Ritz values whether that was
   enough, and the bounds on their residuals when to stop. A large matrix of a CPU has it where many values are wanted
   too, or where they crowd around the edge, by a block that stays narrow (:mod:`pss_param.narrow`).
2. The filtered Gram matrix of :mod:`pss_param.filtered` serves others where values crowd around the edge, as in trained
   weights (Note [Crowded edges] in :mod:`pss_param.passes`), and small ones (from 192 to 256), unless a level is asked
   for.
3. The whole spectrum (:mod:`pss_param.whole`) serves what is left: matrices below 192, flat spectra of which more than
   a quarter is wanted, and levels inside of a dense bulk. It comes from the Gram matrix of the smaller side where its
   squared values keep enough digits, and from ``torch.linalg.svd`` where they do not: for tolerances near the rounding
   of the arithmetic, edges below 1 % of ``S[0]``, and all values of a nearly square matrix.

A matrix whose pieces lie on several devices is never put together: its iteration goes on, to a full basis if need be.

# Note [Many matrices on a GPU]
There a pass over a matrix takes as long as reading it, and small eigenvalue problems, one after the other, ten times as
long. So the matrices of a batch share every kernel, their small eigenvalue problems go to the threads of the host (Note
[Many small eigenproblems] in :mod:`pss_param.eigen`), and two passes are spent on finding out how narrow the block may
be: the guess is the largest of the batch, up to three times what is needed. Up to 1024 Gram matrices serve from the
start, of all matrices with the same smaller side at once: blocks that are filtered (:mod:`pss_param.counts`,
:mod:`pss_param.levels`), or else the whole spectrum (Note [Squares on a GPU] in :mod:`pss_param.whole`).

# Note [What a certificate costs]
``torch.svd_lowrank`` is told ``k``, the number of iterations and the width, and stops without knowing what it has; with
``niter`` iterations it makes ``2 niter + 2`` passes. Here ``||W||_F`` is one more reading, ``k`` has to be found, and
the bound has to come down to the tolerance, not the error: it is 5 to 100 times the error, since what a residual may do
is more than what it does. A matrix with a few dominant values takes 4 to 6 passes (``svd_lowrank``: 4 to 6), one with
``S ~ j^-0.5`` 7 to 11 (6 to 14); they are faster ones, by Note [Which kernel] in :mod:`pss_param.products`. If
``||E||`` itself were known (Note [A residual without its pass] in :mod:`pss_param.krylov`) one of them would be saved
at most. A trained matrix costs one Gram matrix, half of that for the factorisation which proves that nothing was
missed, and 5 to 10 products with it; a large one some 10 ``k`` columns of a pass. Times over a grid of shapes, spectra
and tolerances are in ``examples/benchmarks/results/spectra.json`` and the README.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from pss_param.certificate import OVERSAMPLING, Request, Verdict, by_count, rank_wanted
from pss_param.core import Ritz
from pss_param.filtered import width_for
from pss_param.found import Found
from pss_param.krylov import Krylov, Matrix
from pss_param.looks import verdict_of, verdicts_of
from pss_param.narrow import deepen, reaches, stays_narrow
from pss_param.passes import (
    after_first_look,
    after_later_look,
    before_first_look,
    crowded,
    first_look_of_narrow,
    growth,
    growth_beyond,
)
from pss_param.products import FULL_WIDTH, on_gpu
from pss_param.sketch import BLOCKS_THAT_PAY, FirstBlock, first_block, is_stale, narrowed, starts_left, tiles
from pss_param.whole import dense, dense_together, from_the_left, is_small_on_gpu

# Up to here the whole spectrum costs less wherever the edge lies inside of a bulk, as in fresh and trained weights
# (measured with one thread at 256 x 256: 4.4 ms against 9 to 17 ms; S ~ j^-0.5: equal; a handful of values far above
# the rest: 4.1 ms against 2.1).
_WHOLE_BELOW = 256

# A basis wider than this share of the smaller side costs more than the whole spectrum would: its own small eigenvalue
# problems, every other pass. Giving up at a half instead made fresh and trained weights 1.1 to 2 times as expensive,
# and saved a half only for slowly falling values (S ~ j^-0.3 at 1024 x 1024).
_WIDEST = 4

_WIDE_START = 16  # a first block that fills so much of the smaller side gives way to the Gram matrix at once

_NEARLY = 1.1  # times what the first block sees of it may the largest value be

_CPU_CHUNK = 1 << 14  # elements of W worked on at once: beyond it, a batch runs no faster on a CPU than its matrices
_CUDA_WORKSPACE = 1 << 32  # bytes that the bases of a batch may take; the matrices themselves are not copied
_WORKSPACE = 4 * 128 * 4  # of a row or column: 128 columns in float64, and as much again on the way
_ALIGNED = 64  # bytes


class Asked(NamedTuple):
    """Matrices of one shape, and what is wanted of them.

    Attributes:
        W: finite matrices ``(B, m, n)`` in the dtype to compute in.
        norms: their Frobenius norms ``(B,)``, 1 for matrices of zeros.
        requests: what is wanted of each.
        init: right directions known from before, ``(B, n, b)``.
    """

    W: Tensor
    norms: Tensor
    requests: list[Request]
    init: Tensor | None = None


def solve(asked: Sequence[Asked], seed: int) -> list[list[Found]]:
    """Find the dominant triplets of matrices of one shape, or of several.

    Args:
        asked: the matrices by shape, all on one device and of one dtype.
        seed: of the sketch; every chunk draws the same, so no result depends on what a matrix was batched with.

    Returns:
        One result a matrix.
    """
    found: dict[int, list[Found]] = {}
    sides: dict[int, list[int]] = {}
    for i, those in enumerate(asked):
        if is_small_on_gpu(those.W):
            sides.setdefault(min(those.W.shape[1:]), []).append(i)
        else:
            found[i] = _of_one_shape(*those, seed)
    for places in sides.values():
        found |= zip(places, _of_one_side([asked[i] for i in places], seed), strict=True)
    return [found[i] for i in range(len(asked))]


def _of_one_side(asked: list[Asked], seed: int) -> list[list[Found]]:
    requests = [request for those in asked for request in those.requests]
    found = iter(
        dense_together([those.W for those in asked], torch.cat([those.norms for those in asked]), requests, seed)
    )
    return [list(islice(found, len(those.requests))) for those in asked]


def _of_one_shape(W: Tensor, norms: Tensor, requests: list[Request], init: Tensor | None, seed: int) -> list[Found]:
    if not on_gpu(W) and W.data_ptr() % _ALIGNED:
        W = W.clone()  # a BLAS adds in another order where vectors start elsewhere, and a file may put them anywhere
    m, n = W.shape[1:]
    size = max(1, _CUDA_WORKSPACE // (_WORKSPACE * (m + n)) if on_gpu(W) else _CPU_CHUNK // (m * n))
    found = []
    for start_row in range(0, W.shape[0], size):
        rows = slice(start_row, start_row + size)
        part = None if init is None else init[rows]
        found += _solve_chunk(W[rows], norms[rows], requests[rows], seed, part)
    return found


def solve_sharded(W: Matrix, norms: Tensor, request: Request, seed: int, init: Tensor | None) -> Found:
    """Find the dominant triplets of one matrix ``(1, m, n)`` of which only thin products are to be had.

    Args:
        W: the matrix; all ranks that hold a piece must call.
        norms: its Frobenius norm ``(1,)``, 1 for a matrix of zeros.
        request: what is wanted.
        seed: of the sketch, the same on all ranks.
        init: right directions known from before, ``(1, n, b)``.

    Returns:
        The same bits on every rank, if ``W`` gives the same products on every rank.
    """
    krylov = Krylov(W, norms, seed)
    if init is not None and init.shape[-1] > min(W.shape[-2:]):
        init = None  # wider than the matrix
    left = starts_left([request], init)
    _start(krylov, left, first_block(krylov, [request], init), [request])
    ritz, verdicts = _iterate(_Run(krylov, [request], None, cold=not left))
    verdict = verdicts[0]
    return _leading(krylov, ritz, 0, verdict if verdict is not None else verdict_of(krylov, ritz, request))


def _solve_chunk(W: Tensor, scale: Tensor, requests: list[Request], seed: int, init: Tensor | None) -> list[Found]:
    least = min(W.shape[-2:])
    wanted = max((request.rank or 0) + OVERSAMPLING for request in requests)
    if (least <= _WHOLE_BELOW and not on_gpu(W)) or BLOCKS_THAT_PAY * wanted >= least:
        return _all_dense(W, scale, requests, seed)
    init = _useful(W, scale, requests, seed, init)
    if len(requests) == 1:  # without the batch dimension a product is a plain one, which is faster on a CPU
        init = None if init is None else init[0]
        krylov = Krylov(W[0], scale[0], seed)
    else:
        krylov = Krylov(W, scale, seed)
    from_left = starts_left(requests, init)
    first = first_block(krylov, requests, init)
    if first.block.shape[-1] * _WIDE_START >= least and not from_left:
        return _all_dense(W, scale, requests, seed)
    if on_gpu(W) and len(requests) > 1 and init is None:
        first = FirstBlock(first.block[..., : narrowed(krylov, first.block, requests, from_left)])
    _start(krylov, from_left, first, requests)
    widest = least // _WIDEST
    if on_gpu(W):  # what needs more columns than there is memory for goes on by itself
        widest = min(widest, _CUDA_WORKSPACE // (16 * len(requests) * sum(W.shape[1:])))
    ritz, verdicts = _iterate(_Run(krylov, requests, widest, cold=not from_left))
    if init is not None and None in verdicts and reaches(krylov, _ranks(ritz.S, requests)[0], widest, requests):
        # The block is as wide as what was known, which costs more than a narrow one that starts anew.
        return _solve_chunk(W, scale, requests, seed, None)
    found = dict(enumerate(_all_leading(krylov, ritz, verdicts)))
    left = [i for i, one in found.items() if one is None]
    for i in left:
        found[i] = dense(W[i], scale[i], requests[i], seed, _directions(W[i], krylov, ritz, i, requests[i]))
    return [one for one in found.values() if one is not None]


def _useful(W: Tensor, scale: Tensor, requests: list[Request], seed: int, init: Tensor | None) -> Tensor | None:
    """Known directions, if a start with them may cost less than one without."""
    if init is None or init.shape[-1] * _WIDEST >= min(W.shape[-2:]):  # wider than the iteration may become
        return None
    if len(requests) == 1 and is_stale(Krylov(W[0], scale[0], seed), requests, init[0]):
        return None
    return init


def _all_dense(W: Tensor, scale: Tensor, requests: list[Request], seed: int) -> list[Found]:
    return [dense(*one, seed) for one in zip(W, scale, requests, strict=True)]


def _directions(W: Tensor, krylov: Krylov, ritz: Ritz, index: int, request: Request) -> Tensor:
    """As many Ritz vectors of the Gram matrix's side as the start had columns, or more if the filter wants them."""
    k = rank_wanted(ritz.S[index][0], request)
    U, _, Vh = krylov.triplets(ritz, index, min(max(krylov.random_columns, width_for(k)), krylov.rank))
    return U if from_the_left(W) else Vh.mT


def _start(krylov: Krylov, left: bool, first: FirstBlock, requests: list[Request]) -> None:
    if left:
        krylov.start_left(first.block, first.squares)
        return
    krylov.start(first.block, first.squares)
    if first.spare is None or not first.spare.shape[-1]:
        return
    nearly = [[_NEARLY * S[0]] for S in krylov.core.values()]
    needed = max(_ranks(nearly, requests)) + OVERSAMPLING
    if stays_narrow(krylov, requests):
        needed = min(needed, FULL_WIDTH)
    if needed > krylov.random_columns:  # the sketch took a cluster of values for one
        krylov.widen(first.spare[:, : tiles(needed) - krylov.random_columns])


class _Run(NamedTuple):
    """An iteration, and what it is for; ``widest`` columns may its basis have, as many as it takes if there is none."""

    krylov: Krylov
    requests: list[Request]
    widest: int | None
    cold: bool

    @property
    def narrow(self) -> bool:
        """Whether its block need not be as wide as what is wanted."""
        return self.cold and self.widest is not None and stays_narrow(self.krylov, self.requests)


class _Look(NamedTuple):
    """What a basis holds, and what that amounts to."""

    ritz: Ritz
    verdicts: list[Verdict]

    @property
    def wanted(self) -> int:
        """Columns that a block is to have."""
        return max(verdict.k for verdict in self.verdicts) + OVERSAMPLING

    @property
    def enough(self) -> list[Verdict | None]:
        """The verdicts that are final."""
        return [verdict if verdict.enough else None for verdict in self.verdicts]

    def up_to(self, k: int) -> list[Verdict | None]:
        """Those of no more than ``k`` values."""
        return [verdict if verdict is not None and verdict.k <= k else None for verdict in self.enough]


def _iterate(run: _Run) -> tuple[Ritz, list[Verdict | None]]:
    """Run until every matrix has its verdict; ``None`` for those that need a basis wider than ``widest``."""
    krylov, requests, widest, cold = run
    if cold:
        _advance_unseen(krylov, requests, widest)
    before, passes = math.inf, 0
    while True:
        ritz = krylov.ritz()
        look = _Look(ritz, verdicts_of(krylov, ritz, requests))
        if krylov.complete or (look.wanted <= krylov.random_columns and all(look.enough)):
            return ritz, look.enough
        too_wide = widest is not None and _too_wide(krylov, ritz, requests, widest)
        if widest is not None and run.narrow and _goes_deep(krylov, look, too_wide):
            ritz, verdict = deepen(krylov, requests[0], widest, (ritz, look.verdicts[0]))
            return ritz, [verdict]
        if too_wide:
            return ritz, look.enough
        missing = (min(look.wanted, FULL_WIDTH) if run.narrow else look.wanted) - krylov.random_columns
        worst = max(verdict.error / request.tol for verdict, request in zip(look.verdicts, requests, strict=True))
        first = cold and passes == 0
        leap = _first_leap(krylov, ritz, look.verdicts, worst) if first else after_later_look(worst, before, passes)
        before, passes = worst, leap if by_count(requests) and missing <= 0 else max(2, leap // 2 * 2)
        if not _advance(krylov, passes, missing, widest):
            return ritz, look.up_to(krylov.random_columns - OVERSAMPLING)


def _goes_deep(krylov: Krylov, look: _Look, too_wide: bool) -> bool:
    return krylov.random_columns >= FULL_WIDTH and (too_wide or look.wanted > krylov.random_columns)


def _advance(krylov: Krylov, passes: int, missing: int, widest: int | None) -> bool:
    """So many passes, with random columns for those that are missing; no if the basis may not become as wide."""
    fresh = max(0, missing - krylov.young_columns)
    fresh = tiles(krylov.next_columns + fresh) - krylov.next_columns if fresh else 0
    for i in range(passes):
        if not krylov.reached:
            krylov.advance()
            continue
        wider = krylov.rank + krylov.next_columns + fresh
        if krylov.complete or (i and widest is not None and wider > widest):
            break
        if widest is not None and wider > max(widest, krylov.rank):
            return False
        krylov.advance(fresh)
        fresh = 0
    return True


def _advance_unseen(krylov: Krylov, requests: list[Request], widest: int | None) -> None:
    """The passes before the first look: one block shows nothing but a matrix of low rank."""
    columns, tol = krylov.random_columns, min(request.tol for request in requests)
    passes = first_look_of_narrow(tol) if columns < FULL_WIDTH else None
    if passes is None:
        grows = _growth(krylov.core.values(), requests, columns)
        passes = before_first_look(grows, tol, columns, min(krylov.W.shape[-2:]))
    for _ in range(passes):
        wider = krylov.rank + columns if krylov.reached else krylov.rank
        if krylov.complete or (widest is not None and wider > widest):
            return
        krylov.advance()


def _first_leap(krylov: Krylov, ritz: Ritz, verdicts: list[Verdict], worst: float) -> int:
    grows = growth(ritz.S, [verdict.k for verdict in verdicts], krylov.random_columns)
    return after_first_look(grows, worst, min(krylov.W.shape[-2:]), len(krylov.core.widths))


def _too_wide(krylov: Krylov, ritz: Ritz, requests: list[Request], widest: int) -> bool:
    """Whether the Gram matrix costs less than the passes that are needed: Note [Crowded edges] in ``passes``."""
    columns, least = krylov.random_columns, min(krylov.W.shape[-2:])
    if krylov.rank >= widest:
        return True
    if krylov.rank < 2 * columns or not by_count(requests):  # before, the last values are far too low
        return False
    ranks = _ranks(ritz.S, requests)
    needed = max(ranks) + OVERSAMPLING
    if needed <= columns:
        return crowded(growth(ritz.S, ranks, columns), columns, least)
    return crowded(growth_beyond(ritz.S, ranks, tiles(needed)), tiles(needed), least)


def _ranks(values: list[list[float]], requests: list[Request]) -> list[int]:
    return [rank_wanted(S[0], request) for S, request in zip(values, requests, strict=True)]


def _growth(values: list[list[float]], requests: list[Request], columns: int) -> float:
    return growth(values, _ranks(values, requests), columns)


def _leading(krylov: Krylov, ritz: Ritz, index: int, verdict: Verdict) -> Found:
    return _found(krylov.triplets(ritz, index, verdict.k), ritz, index, verdict)


def _all_leading(krylov: Krylov, ritz: Ritz, verdicts: list[Verdict | None]) -> list[Found | None]:
    """The results of those that have their verdict, computed together where there are several."""
    most = max((verdict.k for verdict in verdicts if verdict is not None), default=0)
    if len(verdicts) == 1 or not most:
        return [None if one is None else _leading(krylov, ritz, i, one) for i, one in enumerate(verdicts)]
    U, S, Vh = krylov.all_triplets(ritz, most)
    return [
        None if one is None else _found((U[i, :, : one.k], S[i, : one.k], Vh[i, : one.k]), ritz, i, one)
        for i, one in enumerate(verdicts)
    ]


def _found(triplets: tuple[Tensor, Tensor, Tensor], ritz: Ritz, index: int, verdict: Verdict) -> Found:
    S = triplets[1]
    residual = torch.tensor(ritz.residual[index][: verdict.k], dtype=S.dtype, device=S.device)
    return Found(*triplets, residual, ritz.S[index][0], verdict)
