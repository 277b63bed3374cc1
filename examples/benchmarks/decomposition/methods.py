# SPDX-License-Identifier: Apache-2.0
"""This package and the ways a user would reach for, each as a call that returns ``U, S - S[k], V``."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from scipy.sparse.linalg import svds
from sklearn.utils.extmath import randomized_svd

import pss_param as pss

from .cases import Case, Triplets


def ours(made: Case, tol: float) -> Triplets:
    """This package, told nothing but the tolerance."""
    found = pss.dominant_directions(made.W, tol=tol)
    return found.U, (found.S - found.edge).clamp_min(0), found.Vh.mT


def lowrank(made: Case, q: int, niter: int) -> Triplets:
    """``torch.svd_lowrank``."""
    U, S, V = torch.svd_lowrank(made.W, q=q, niter=niter)
    k = made.k
    return U[:, :k], (S[:k] - S[k]).clamp_min(0), V[:, :k]


def lowrank_of_layers(made: Case, q: int, niter: int) -> Triplets:
    """The same at matmul precision "medium", which gives its products to oneDNN."""
    # On a CPU that has no units for fewer digits they keep those of float32.
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        return lowrank(made, q, niter)
    finally:
        torch.set_float32_matmul_precision(before)


def full(made: Case) -> Triplets:
    """``torch.linalg.svd``."""
    U, S, Vh = torch.linalg.svd(made.W, full_matrices=False)
    k = made.k
    return U[:, :k], S[:k] - S[k], Vh[:k].mT


def lobpcg(made: Case, niter: int) -> Triplets:
    """``torch.lobpcg`` on the Gram operator."""
    gram, k = made.W.mT @ made.W, made.k
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(gram.shape[0], k + 1, generator=generator)
    values, V = torch.lobpcg(gram, k=k + 1, X=start, niter=niter, tol=0.0)
    S = values.clamp_min(0).sqrt()
    return (made.W @ V[:, :k]) / S[:k], (S[:k] - S[k]).clamp_min(0), V[:, :k]


def scipy_svds(made: Case, solver: str, tol: float) -> Triplets:
    """``scipy.sparse.linalg.svds``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lobpcg says at length what it did not reach; we measure it
        U, S, Vh = svds(made.W.numpy(), k=made.k + 1, solver=solver, tol=tol, rng=0)
    U, S, Vh = (torch.from_numpy(x.copy()) for x in (U[:, ::-1], S[::-1], Vh[::-1]))
    return U[:, : made.k], (S[: made.k] - S[made.k]).clamp_min(0), Vh[: made.k].mT


def sklearn_randomized(made: Case, extra: int, niter: int) -> Triplets:
    """``sklearn.utils.extmath.randomized_svd``."""
    U, S, Vh = (
        torch.from_numpy(x)
        for x in randomized_svd(made.W.numpy(), made.k + 1, n_oversamples=extra, n_iter=niter, random_state=0)
    )
    return U[:, : made.k], (S[: made.k] - S[made.k]).clamp_min(0), Vh[: made.k].mT


_ITERATIONS = (*range(10), 12, 16, 24, 32)
AT_MEDIUM = "svd_lowrank at precision 'medium'"
OTHERS = (AT_MEDIUM, "sklearn", "lobpcg", "svds arpack", "svds propack", "svds lobpcg")


def settings(made: Case) -> dict[str, list[Callable[[], Triplets]]]:
    """Rivals with their settings, cheapest first; each is told ``k``."""
    k, most = made.k, min(made.W.shape)
    widths = sorted({min(most, k + extra) for extra in (6, max(12, k // 2), k + 10)})
    table: dict[str, list[Callable[[], Triplets]]] = {
        "svd_lowrank": [lambda q=q, i=i: lowrank(made, q, i) for i in _ITERATIONS for q in widths],
    }
    table[AT_MEDIUM] = [lambda q=q, i=i: lowrank_of_layers(made, q, i) for i in _ITERATIONS for q in widths]
    table["sklearn"] = [lambda q=q, i=i: sklearn_randomized(made, q - k, i) for i in _ITERATIONS for q in widths]
    table["lobpcg"] = [lambda i=i: lobpcg(made, i) for i in (5, 10, 20, 40)] if 3 * (k + 1) < most else []
    for solver in ("arpack", "propack", "lobpcg"):
        tolerances = (1e-1, 1e-2, 1e-4) if k < 100 else ()
        table[f"svds {solver}"] = [lambda s=solver, t=t: scipy_svds(made, s, t) for t in tolerances]
    return table
