# SPDX-License-Identifier: Apache-2.0
r"""A look at an iteration: what its small matrices say of each matrix."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pss_param.certificate import OVERSAMPLING, Request, Spectrum, Verdict, judge, leak
from pss_param.core import Ritz
from pss_param.krylov import Krylov

__all__ = ["verdict_of", "verdicts_of"]

_ROW_BLOCK = 1 << 22  # elements of W that a measurement by rows holds twice


def verdicts_of(krylov: Krylov, ritz: Ritz, requests: list[Request]) -> list[Verdict]:
    """What has been found of each matrix of a batch, and how well.

    Args:
        krylov: the iteration.
        ritz: its present triplets.
        requests: what is wanted of each matrix.

    Returns:
        A verdict each.
    """
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


def verdict_of(krylov: Krylov, ritz: Ritz, request: Request) -> Verdict:
    """The same of a single matrix, without a second look.

    Args:
        krylov: the iteration.
        ritz: its present triplets.
        request: what is wanted.

    Returns:
        The verdict.
    """
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
