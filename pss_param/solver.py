# SPDX-License-Identifier: Apache-2.0
r"""Dominant triplets of a batch of matrices: which algorithm serves which matrix.

# Note [Which algorithm serves which matrix]
1. The block iteration of :mod:`pss_param.krylov` serves matrices of which a few values are wanted that stand apart from
   the rest, whatever their size. A narrow sketch says how wide the block should be, the Ritz values whether that was
   enough, and the bounds on their residuals when to stop.
2. The filtered Gram matrix of :mod:`pss_param.filtered` serves those where values crowd around the edge, as in trained
   weights (Note [Crowded edges] in :mod:`pss_param.passes`), and small ones (from 192 to 256), unless a level is asked
   for.
3. The whole spectrum (:mod:`pss_param.whole`) serves what is left: matrices below 192, flat spectra of which more than
   a quarter is wanted, and levels inside of a dense bulk. It comes from the Gram matrix of the smaller side where its
   squared values keep enough digits, and from ``torch.linalg.svd`` where they do not: for tolerances near the rounding
   of the arithmetic, edges below 1 % of ``S[0]``, and all values of a nearly square matrix.

A matrix whose pieces lie on several devices is never put together: its iteration goes on, to a full basis if need be.

# Note [Many matrices on a GPU]
There a pass over a matrix takes as long as reading it, and small eigenvalue problems, one after the other, ten times as
long. So the matrices of a batch share every kernel (Note [Many small eigenproblems] in :mod:`pss_param.eigen`), and two
passes are spent on finding out how narrow the block may be: the guess is the largest of the batch, up to three times
what is needed. Up to 1024 the whole spectrum serves (Note [Squares on a GPU] in :mod:`pss_param.whole`), and for what
lies above a level Note [Levels on a GPU] in :mod:`pss_param.levels`.

# Note [What a certificate costs]
``torch.svd_lowrank`` is told ``k``, the number of iterations and the width, and stops without knowing what it has;
with ``niter`` iterations it makes ``2 niter + 2`` passes. Here ``||W||_F`` is one more reading, ``k`` has to be found,
and the bound has to come down to the tolerance, not the error: it is 5 to 100 times the error, since what a residual
may do is more than what it does. A matrix with a few dominant values takes 4 to 6 passes (``svd_lowrank``: 4 to 6),
one with ``S ~ j^-0.5`` 7 to 11 (6 to 14); they are faster ones, by Note [Which kernel] in :mod:`pss_param.products`.
If ``||E||`` itself were known (Note [A residual without its pass] in :mod:`pss_param.krylov`) one of them would be
saved at most. A trained matrix costs one Gram matrix, half of that for the factorisation which proves that nothing was
missed, and 5 to 10 products with it. Times over a grid of shapes, spectra and tolerances are in
``examples/benchmarks/results/spectra.json`` and the README.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from pss_param.blocks import gram, orthonormal
from pss_param.certificate import OVERSAMPLING, Request, Spectrum, Verdict, judge, leak, stable_rank_of
from pss_param.core import Ritz
from pss_param.eigen import largest, largest_and_trace
from pss_param.filtered import width_for
from pss_param.found import Found
from pss_param.krylov import Krylov, Matrix
from pss_param.passes import (
    after_first_look, after_later_look, before_first_look, crowded, first_look_of_narrow, growth,
)  # fmt: skip
from pss_param.products import FULL_WIDTH, on_gpu
from pss_param.whole import WHOLE_BELOW_ON_GPU, dense_all

_HALF_A_TILE = 8
"""Columns that are enough for one or two values where depth counts more than width: in a bulk, and if the tolerance is
loose or the matrix small."""

_SMALL = 1 << 18
"""Elements of a matrix up to which a pass with twice the columns, and what follows it, takes twice the time."""

_LOOSE = 5e-3

# An iteration takes about four blocks to show that it has converged. Where twice as many would fill the smaller side,
# the whole spectrum costs less than the small eigenvalue problems on the way. Up to 256 it does so wherever the edge
# lies inside of a bulk, as in fresh and trained weights (measured with one thread at 256 x 256: 4.4 ms against 9 to 17
# ms; S ~ j^-0.5: equal; a handful of values far above the rest: 4.1 ms against 2.1).
_BLOCKS_THAT_PAY = 8
_WHOLE_BELOW = 256

# A basis wider than this share of the smaller side costs more than the whole spectrum would: its own small eigenvalue
# problems, every other pass. Giving up at a half instead made fresh and trained weights 1.1 to 2 times as expensive,
# and saved a half only for slowly falling values (S ~ j^-0.3 at 1024 x 1024).
_WIDEST = 4

_WIDE_START = 16  # a first block that fills so much of the smaller side gives way to the Gram matrix at once

_CPU_CHUNK = 1 << 14  # elements of W worked on at once: beyond it, a batch runs no faster on a CPU than its matrices
_CUDA_WORKSPACE = 1 << 32  # bytes that the bases of a batch may take; the matrices themselves are not copied
_WORKSPACE = 4 * 128 * 4  # of a row or column: 128 columns in float64, and as much again on the way
_ALIGNED = 64  # bytes
_ROW_BLOCK = 1 << 22  # elements of W that a measurement by rows holds twice


def solve(W: Tensor, norms: Tensor, requests: list[Request], seed: int, init: Tensor | None) -> list[Found]:
    """Find the dominant triplets of each matrix of a batch.

    Args:
        W: finite matrices ``(B, m, n)`` in the dtype to compute in.
        norms: their Frobenius norms ``(B,)``, 1 for matrices of zeros.
        requests: what is wanted of each.
        seed: of the sketch; every chunk draws the same, so no result depends on what a matrix was batched with.
        init: right directions known from before, ``(B, n, b)``.

    Returns:
        One result a matrix.
    """
    if not on_gpu(W) and W.data_ptr() % _ALIGNED:
        W = W.clone()  # a BLAS adds in another order where vectors start elsewhere, and a file may put them anywhere
    m, n = W.shape[1:]
    size = max(1, _CUDA_WORKSPACE // (_WORKSPACE * (m + n)) if on_gpu(W) else _CPU_CHUNK // (m * n))
    if size >= W.shape[0]:
        return _solve_chunk(W, norms, requests, seed, init)
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
    left = _starts_left([request], init)
    _start(krylov, left, *_first_block(krylov, [request], init))
    ritz, verdicts = _iterate(krylov, [request], None, cold=not left)
    verdict = verdicts[0]
    return _leading(krylov, ritz, 0, verdict if verdict is not None else _verdict(krylov, ritz, request))


def _solve_chunk(W: Tensor, scale: Tensor, requests: list[Request], seed: int, init: Tensor | None) -> list[Found]:
    least = min(W.shape[-2:])
    wanted = max((request.rank or 0) + OVERSAMPLING for request in requests)
    if least <= (WHOLE_BELOW_ON_GPU if on_gpu(W) else _WHOLE_BELOW) or _BLOCKS_THAT_PAY * wanted >= least:
        return dense_all(W, scale, requests, seed, dict.fromkeys(range(len(requests))))
    if init is not None and init.shape[-1] * _WIDEST >= least:
        init = None  # wider than the iteration may become
    if len(requests) == 1:  # without the batch dimension a product is a plain one, which is faster on a CPU
        init = None if init is None else init[0]
        krylov = Krylov(W[0], scale[0], seed)
    else:
        krylov = Krylov(W, scale, seed)
    from_left = _starts_left(requests, init)
    block, squares = _first_block(krylov, requests, init)
    if block.shape[-1] * _WIDE_START >= least and not from_left:
        return dense_all(W, scale, requests, seed, dict.fromkeys(range(len(requests))))
    if on_gpu(W) and len(requests) > 1 and init is None:
        columns = _narrowed(krylov, block, requests, from_left)
        block, squares = block[..., :columns], None
    _start(krylov, from_left, block, squares)
    widest = least // _WIDEST
    if on_gpu(W):  # what needs more columns than there is memory for goes on by itself
        widest = min(widest, _CUDA_WORKSPACE // (16 * len(requests) * sum(W.shape[1:])))
    ritz, verdicts = _iterate(krylov, requests, widest, cold=not from_left)
    found = dict(enumerate(_all_leading(krylov, ritz, verdicts)))
    left = [i for i, one in found.items() if one is None]
    starts = {i: _directions(krylov, ritz, i, requests[i]) for i in left}
    found.update(zip(left, dense_all(W, scale, requests, seed, starts), strict=True))
    return [one for one in found.values() if one is not None]


def _directions(krylov: Krylov, ritz: Ritz, index: int, request: Request) -> Tensor:
    """As many Ritz vectors of the smaller side as the start had columns, or more if the filter wants them."""
    k = _count(ritz.S[index][0], request)
    U, _, Vh = krylov.triplets(ritz, index, min(max(krylov.random_columns, width_for(k)), krylov.rank))
    return U if U.shape[0] < Vh.shape[1] else Vh.mT


def _starts_left(requests: list[Request], init: Tensor | None) -> bool:
    """Whether to start from left directions, which say more of what is unseen: of known ones, and behind a level."""
    return init is not None or not _filterable(requests)


def _start(krylov: Krylov, left: bool, block: Tensor, squares: Tensor | None) -> None:
    (krylov.start_left if left else krylov.start)(block, squares)


def _first_block(krylov: Krylov, requests: list[Request], init: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A sketch as wide as the stable rank asks for, as far as a narrow one can tell; beside what is known already.

    Args:
        krylov: the iteration that is to start.
        requests: what is wanted of each matrix.
        init: right directions known from before.

    Returns:
        The block, and its Gram matrix where it was needed.
    """
    least = min(krylov.W.shape[-2:])
    wanted = max((request.rank or 0) + OVERSAMPLING for request in requests)
    if init is not None:
        known = init.shape[-1]
        return krylov.left_sketch(min(_tiles(known + OVERSAMPLING), least) - known, init), None
    sketch = krylov.left_sketch if _starts_left(requests, init) else krylov.right_sketch
    if all(request.rank is not None for request in requests):
        norm_alone = all(request.rank == 0 for request in requests)  # which may be that of a flat matrix
        return sketch(min(least, _HALF_A_TILE if norm_alone else _tiles(wanted))), None
    small = math.prod(krylov.W.shape) <= _SMALL
    block = sketch(min(least, _HALF_A_TILE if small else FULL_WIDTH))
    while True:  # by doubling: a narrow sketch may be unlucky with the top direction, and a wider one sees further
        held, squares = block.shape[-1], gram(block)
        wanted = _guess(squares) + OVERSAMPLING
        deep = small or not _filterable(requests) or all(request.tol >= _LOOSE for request in requests)
        best = _HALF_A_TILE if deep and wanted <= _HALF_A_TILE else _tiles(wanted)
        columns = min(best, 2 * held, least // _BLOCKS_THAT_PAY)
        if columns <= held:
            held = min(held, best)
            return block[..., :held], squares[..., :held, :held]
        block = torch.cat([block, sketch(columns - held)], dim=-1)


def _narrowed(krylov: Krylov, block: Tensor, requests: list[Request], left: bool) -> int:
    """No more columns of a sketch than are needed, as two more passes tell: Note [Many matrices on a GPU]."""
    first, second = (krylov.back, krylov.forth) if left else (krylov.forth, krylov.back)
    tops = largest(gram(second(orthonormal(first(orthonormal(block)))))).sqrt().tolist()
    ranks = [_count(top, request) for top, request in zip(tops, requests, strict=True)]
    return min(block.shape[-1], _tiles(max(ranks) + OVERSAMPLING))


def _tiles(columns: int) -> int:
    """The next width at which a pass is no slower than a narrower one: Note [Which kernel] in ``products``."""
    return math.ceil(columns / FULL_WIDTH) * FULL_WIDTH


def _guess(squares: Tensor) -> int:
    """A stable rank from the Gram matrix ``(..., b, b)`` of a sketch ``Z = W Omega``: the largest of the batch."""
    # The Gram matrix of Z has the identity as its mean. A dominant direction, of a share p = 1 / SR of the energy, adds
    # to its largest eigenvalue about b p, scattered like chi^2 of b; the others share what is left of the energy.
    # So p is b - 1 parts of the largest one's share of the trace, and also what the mean of the others lacks to one.
    # Their average is right within a factor of two up to a stable rank of b / 2, and low beyond b.
    b = squares.shape[-1]
    parts = min((b * top / trace + top - trace + b - 2) / 2 for top, trace in largest_and_trace(squares))
    return math.floor((b - 1) / max(parts, 0.05))


def _iterate(
    krylov: Krylov, requests: list[Request], widest: int | None, cold: bool
) -> tuple[Ritz, list[Verdict | None]]:
    """Run until every matrix has its verdict; ``None`` for those that need a basis wider than ``widest``."""
    by_count = _filterable(requests)
    if cold:
        _advance_unseen(krylov, requests, widest)
    before, passes = math.inf, 0
    while True:
        ritz = krylov.ritz()
        verdicts = _verdicts(krylov, ritz, requests)
        missing = max(verdict.k for verdict in verdicts) + OVERSAMPLING - krylov.random_columns
        known = missing <= 0 and all(verdict.enough for verdict in verdicts)
        if known or krylov.complete or (widest is not None and _too_wide(krylov, ritz, requests, widest)):
            return ritz, [verdict if verdict.enough else None for verdict in verdicts]
        fresh = max(0, missing - krylov.young_columns)
        fresh = _tiles(krylov.next_columns + fresh) - krylov.next_columns if fresh else 0
        worst = max(verdict.error / request.tol for verdict, request in zip(verdicts, requests, strict=True))
        first = cold and passes == 0
        if first:
            grows = growth(ritz.S, [verdict.k for verdict in verdicts], krylov.random_columns)
            leap = after_first_look(grows, worst, min(krylov.W.shape[-2:]))
        else:
            leap = after_later_look(worst, before, passes)
        before, passes = worst, leap if by_count and missing <= 0 else max(2, leap // 2 * 2)
        for i in range(passes):
            if not krylov.reached:
                krylov.advance()
                continue
            wider = krylov.rank + krylov.next_columns + fresh
            if krylov.complete or (i and widest is not None and wider > widest):
                break
            if widest is not None and wider > max(widest, krylov.rank):
                mature = krylov.random_columns - OVERSAMPLING
                return ritz, [verdict if verdict.enough and verdict.k <= mature else None for verdict in verdicts]
            krylov.advance(fresh)
            fresh = 0


def _advance_unseen(krylov: Krylov, requests: list[Request], widest: int | None) -> None:
    """The passes before the first look: one block shows nothing but a matrix of low rank."""
    columns, tol = krylov.random_columns, min(request.tol for request in requests)
    passes = first_look_of_narrow(tol) if columns < FULL_WIDTH else None
    if passes is None:
        grows = _growth(krylov.core.values(), requests, columns)
        passes = 2 if crowded(grows, columns, min(krylov.W.shape[-2:])) else before_first_look(grows, tol, columns)
    for _ in range(passes):
        wider = krylov.rank + columns if krylov.reached else krylov.rank
        if krylov.complete or (widest is not None and wider > widest):
            return
        krylov.advance()


def _filterable(requests: list[Request]) -> bool:
    return all(request.level is None and not request.bulk for request in requests)


def _too_wide(krylov: Krylov, ritz: Ritz, requests: list[Request], widest: int) -> bool:
    """Whether the Gram matrix costs less than the passes that the iteration needs: Note [Crowded edges]."""
    columns, least = krylov.random_columns, min(krylov.W.shape[-2:])
    if krylov.rank >= widest:
        return True
    if krylov.rank < 2 * columns or not _filterable(requests):  # before, the last values are far too low
        return False
    return crowded(_growth(ritz.S, requests, columns), columns, least)


def _growth(values: list[list[float]], requests: list[Request], columns: int) -> float:
    ranks = [_count(S[0], request) for S, request in zip(values, requests, strict=True)]
    return growth(values, ranks, columns)


def _count(top: float, request: Request) -> int:
    return math.floor(stable_rank_of(top)) if request.rank is None else request.rank


def _verdicts(krylov: Krylov, ritz: Ritz, requests: list[Request]) -> list[Verdict]:
    spectra, verdicts = [], []
    for i, request in enumerate(requests):
        seen = _spectrum(krylov, ritz, i)
        verdict = judge(seen, request)
        if verdict.faint and isinstance(krylov.W, Tensor):
            seen = replace(seen, tail=_tail(_matrix(krylov.W, i), krylov, ritz, i, max(0, len(seen.S) - OVERSAMPLING)))
            verdict = judge(seen, request)
        spectra.append(seen)
        verdicts.append(verdict)
    return _closer(krylov, ritz, spectra, verdicts, requests)


def _closer(
    krylov: Krylov, ritz: Ritz, spectra: list[Spectrum], verdicts: list[Verdict], requests: list[Request]
) -> list[Verdict]:
    """A second look with ceilings, where what they cost may save passes: where the residuals are small enough."""
    levels, better = {}, list(verdicts)
    for i, (seen, verdict, request) in enumerate(zip(spectra, verdicts, requests, strict=True)):
        level = request.level if request.level is not None else verdict.bulk_edge if request.bulk else verdict.edge
        near = not verdict.enough and verdict.k < len(seen.S) and level > 0
        if near and leak(seen, level, verdict.k) <= request.tol:
            levels[i] = level
    for i, ceilings in krylov.core.ceilings(ritz, levels).items():
        second = judge(replace(spectra[i], ceilings=ceilings), requests[i])
        # The ceilings hold down to the first verdict's edge; while much is unseen, the plain residuals may say more.
        if second.k <= verdicts[i].k and second.error < verdicts[i].error:
            better[i] = second
    return better


def _verdict(krylov: Krylov, ritz: Ritz, request: Request) -> Verdict:
    return judge(_spectrum(krylov, ritz, 0), request)


def _spectrum(krylov: Krylov, ritz: Ritz, index: int) -> Spectrum:
    m, n = krylov.W.shape[-2:]
    return Spectrum(ritz.S[index], ritz.residual[index], (m, n), krylov.complete, torch.finfo(krylov.W.dtype).eps)


def _matrix(W: Tensor, index: int) -> Tensor:
    return W[index] if W.dim() > 2 else W


def _tail(W: Tensor, krylov: Krylov, ritz: Ritz, index: int, count: int) -> tuple[int, float]:
    """Squared norm of one matrix without its leading triplets, measured block of rows by block of rows."""
    U, S, Vh = krylov.triplets(ritz, index, count)
    inverse, energy = krylov.inverse_scale, 0.0
    if isinstance(inverse, Tensor):
        inverse = inverse[index]
    rows = max(1, _ROW_BLOCK // W.shape[1])
    for start in range(0, W.shape[0], rows):
        rest = W[start : start + rows] * inverse - (U[start : start + rows] * S) @ Vh
        energy += float(torch.linalg.vector_norm(rest)) ** 2
    return count, energy


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
