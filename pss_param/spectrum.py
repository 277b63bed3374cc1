# SPDX-License-Identifier: Apache-2.0
r"""Spectra of weight matrices: stable rank, spectral norm and certified dominant directions.

Pure functions on ``(..., m, n)``: any floating dtype in, arithmetic in float32 or wider with autocast off, no
gradients, no global random state. Batches are worked on in chunks that fit a memory budget.

Which algorithm serves which matrix stands in :mod:`pss_param.solver`; what the certificate says, and how ``k`` is
decided, in :mod:`pss_param.certificate`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pss_param.certificate import STABLE_RANK_SLACK, Request, stable_rank_of
from pss_param.errors import ArgumentError, NonFiniteError
from pss_param.found import Found
from pss_param.precision import full_precision
from pss_param.sharded import ShardedMatrix, is_sharded
from pss_param.solver import Asked, solve, solve_sharded

_SEED = 0x50555
_TAME = 1e-30, 1e30
_NOT_FINITE = "W must be finite, got NaN or infinity; take the weight from a checkpoint before the blow-up"


@dataclass(frozen=True)
class DominantDirections:
    r"""The top of a spectrum with its certificate.

    Columns at or beyond a matrix's own ``k`` are zero where a batch holds matrices of different ``k``; ``r`` is the
    largest.

    Attributes:
        U: left directions, ``(..., m, r)``.
        S: singular values in descending order, ``(..., r)``.
        Vh: right directions, ``(..., r, n)``.
        edge: the first value not taken, ``S[k]``, ``(...)``; zero when all were taken. Where a level was asked for, no
            more than a lower bound of it.
        k: how many values each matrix has here, int64 ``(...)``.
        stable_rank: ``||W||_F^2 / S[0]^2``, dimensionless, ``(...)``.
        spectral_norm: ``S[0]``, ``(...)``; known also where ``k = 0``.
        bulk_edge: the Marchenko-Pastur edge where ``above="bulk"`` asked for it, else NaN, ``(...)``.
        residual: ``max(||W v - s u||, ||W^T u - s v||) / S[0]`` per triplet, ``(..., r)``.
        error: bound on the error of the smoothed matrix over ``||W||_F``, ``(...)``: Note [What the certificate
            says].
        converged: whether ``error <= tol``, bool ``(...)``.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    edge: Tensor
    k: Tensor
    stable_rank: Tensor
    spectral_norm: Tensor
    bulk_edge: Tensor
    residual: Tensor
    error: Tensor
    converged: Tensor


@torch.no_grad()
def stable_rank(W: Tensor) -> Tensor:
    r"""Stable rank: how many directions carry the energy of a matrix.

    .. math:: \mathrm{SR}(W) = \|W\|_F^2 / \sigma_0(W)^2 \in [1, \min(m, n)]

    Args:
        W: matrices ``(..., m, n)``, any floating dtype.

    Shape:
        ``(..., m, n)`` to ``(...)``, float32 or wider; dimensionless. The zero matrix has stable rank 0.

    Returns:
        The stable rank of each matrix, to 1e-4 relative.

    Raises:
        ArgumentError: ``W`` is no floating tensor of at least two dimensions.
        NonFiniteError: ``W`` holds NaN or infinity.

    Example:
        >>> round(float(stable_rank(torch.diag(torch.tensor([2.0, 2.0, 0.0])))), 4)
        2.0

    References:
        Rudelson and Vershynin, "Sampling from large matrices", J. ACM 54 (2007).
    """
    return dominant_directions(W, rank=0, tol=STABLE_RANK_SLACK).stable_rank


@torch.no_grad()
def spectral_norm(W: Tensor) -> Tensor:
    r"""Largest singular value, :math:`\sigma_0(W) = \|W\|_2`, in the units of ``W``.

    Args:
        W: matrices ``(..., m, n)``, any floating dtype.

    Shape:
        ``(..., m, n)`` to ``(...)``, float32 or wider.

    Returns:
        The spectral norm of each matrix, to 5e-5 relative.

    Raises:
        ArgumentError: ``W`` is no floating tensor of at least two dimensions.
        NonFiniteError: ``W`` holds NaN or infinity.

    Example:
        >>> float(spectral_norm(torch.tensor([[3.0, 0.0], [0.0, 4.0]])))
        4.0

    References:
        Golub and Van Loan, "Matrix Computations", 2.3.
    """
    return dominant_directions(W, rank=0, tol=STABLE_RANK_SLACK).spectral_norm


@torch.no_grad()
def dominant_directions(
    W: Tensor,
    rank: int | None = None,
    *,
    above: float | Tensor | str | None = None,
    tol: float = 1e-3,
    generator: torch.Generator | None = None,
    init: Tensor | None = None,
) -> DominantDirections:
    r"""Dominant singular triplets with a certificate: Dominant Direction Decomposition.

    .. math:: W \approx U \,\mathrm{diag}(S)\, V^H + \text{tail}, \qquad k = \lfloor \mathrm{SR}(W) \rfloor

    Values that exceed a level by so little that lowering them would change the matrix by less than ``tol`` may be left
    out: on a GPU, by :mod:`pss_param.levels`.

    ``k`` is capped at ``min(m, n) - 1``, so that there is a value left to be the edge. A stable rank within 1e-4
    (relative) below an integer counts as that integer: Note [An integer stable rank].

    Args:
        W: matrices ``(..., m, n)``, any floating dtype.
        rank: how many triplets; ``None`` means ``floor(SR)`` of each matrix.
        above: take every value above this level instead: a number, a tensor ``(...)`` with a level per matrix, or
            ``"bulk"``
            for the Marchenko-Pastur edge of each matrix's own bulk (:func:`pss_param.smoothing.smooth` gives the
            formula).
        tol: error of the smoothed matrix that is good enough, over ``||W||_F``.
        generator: source of the random sketch; ``None`` means a generator of our own with a fixed seed.
        init: right directions known from before, ``(..., n, r)``; a warm start saves passes.

    Shape:
        ``(..., m, n)`` to ``U (..., m, r), S (..., r), Vh (..., r, n)``, float32 or wider.

    Returns:
        The triplets, the edge, and the certificate: Note [What the certificate says] in this module.

    Raises:
        ArgumentError: a wrong shape or dtype, both ``rank`` and ``above``, or a value out of range.
        NonFiniteError: ``W`` or ``init`` holds NaN or infinity.

    Example:
        >>> found = dominant_directions(torch.diag(torch.tensor([5.0, 3.0, 1.0])), rank=1)
        >>> round(float(found.S[0]), 4), round(float(found.edge), 4), int(found.k)
        (5.0, 3.0, 1)

    References:
        PSS, arXiv 2602.01308 (the decomposition, ``k``); Halko, Martinsson and Tropp, SIAM Review 53 (2011).
    """
    _check_request(rank, above, tol)
    if init is not None and not bool(torch.isfinite(init).all()):
        raise NonFiniteError("init must be finite, got NaN or infinity; leave it out to start afresh")
    if is_sharded(W):
        return _of_sharded(ShardedMatrix(W, batched=True), (rank, above, tol), generator, init)
    return _all_directions([_Asked(W, rank, above, tol, init)], generator)[0]


class _Asked(NamedTuple):
    """The arguments of one call."""

    W: Tensor
    rank: int | None
    above: float | Tensor | str | None
    tol: float
    init: Tensor | None = None


@torch.no_grad()
def directions_together(
    asked: Sequence[tuple[Tensor, int | None, float | Tensor | str | None, float]],
    generator: torch.Generator | None = None,
) -> list[DominantDirections]:
    r"""What :func:`dominant_directions` finds of each; small matrices on a GPU of whatever shapes share their kernels.

    Args:
        asked: ``W, rank, above, tol`` of each call; all matrices on one device and of one dtype, none sharded.
        generator: source of the random sketch, which all share.

    Returns:
        One result a call, with its errors.
    """
    for _, rank, above, tol in asked:
        _check_request(rank, above, tol)
    return _all_directions([_Asked(*one) for one in asked], generator) if asked else []


def _all_directions(asked: list[_Asked], generator: torch.Generator | None) -> list[DominantDirections]:
    prepared = [_prepared(one) for one in asked]
    with full_precision(asked[0].W.device), torch.inference_mode():  # its calls take 3 % less of a small matrix's time
        found = solve([one.solvable for one in prepared], _seed(generator))
    return [
        _gathered(those, one.sizes, one.solvable.requests, one.batch, one.solvable.W)
        for those, one in zip(found, prepared, strict=True)
    ]


class _Prepared(NamedTuple):
    """Matrices as the solver wants them, and what it does not need to know."""

    solvable: Asked
    sizes: list[float]
    batch: torch.Size


def _prepared(asked: _Asked) -> _Prepared:
    W = checked_matrices(asked.W)
    batch, (m, n) = W.shape[:-2], W.shape[-2:]
    flat = W.reshape(-1, m, n)
    norms = frobenius_norm(flat)
    sizes = norms.tolist()
    if max(sizes, default=0.0) > torch.finfo(flat.dtype).max:
        flat = _widened(flat, norms)
    requests = _requests(asked.rank, asked.above, asked.tol, batch, norms)
    start = None if asked.init is None else asked.init.reshape(-1, *asked.init.shape[-2:]).to(flat)
    if any(size and not _TAME[0] < size < _TAME[1] for size in sizes):
        flat, norms = _tamed(flat, norms)
    return _Prepared(Asked(flat, norms if all(sizes) else _to_divide_by(norms), requests, start), sizes, batch)


def _tamed(W: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """The same matrices with norms that, like their inverses, are far from the ends of float32."""
    exponent = -torch.frexp(norms).exponent.clamp(-126, 126)  # by powers of two, so that only the scale changes
    return torch.ldexp(W, exponent[:, None, None]), torch.ldexp(norms, exponent)


def _to_divide_by(norms: Tensor) -> Tensor:
    """Norms, 1 for matrices of zeros."""
    return norms.masked_fill(norms == 0, 1.0)


def _of_sharded(
    W: ShardedMatrix,
    wanted: tuple[int | None, float | Tensor | str | None, float],
    generator: torch.Generator | None,
    init: Tensor | None,
) -> DominantDirections:
    norms = W.frobenius_norm()
    if not bool(torch.isfinite(norms).all()):
        raise NonFiniteError(_NOT_FINITE)
    rank, above, tol = wanted
    requests = _requests(rank, above, tol, torch.Size(), norms)
    init = None if init is None else init.to(W.device, W.dtype)[None]
    with full_precision(W.device):
        found = solve_sharded(W, _to_divide_by(norms), requests[0], _seed(generator), init)
        return _gathered([found], norms.tolist(), requests, torch.Size(), found.U)


def _gathered(
    found: list[Found], sizes: list[float], requests: list[Request], batch: torch.Size, like: Tensor
) -> DominantDirections:
    """Results of single matrices as one batch in the units of ``W``, padded with zeros to the largest ``k``."""
    lines = [
        (
            one.verdict.edge * size, stable_rank_of(one.top), one.top * size, one.verdict.bulk_edge * size,
            one.verdict.error,
        )
        for one, size in zip(found, sizes, strict=True)
    ]  # fmt: skip
    edge, stable, top, bulk_edge, error = _of_each(lines, batch, like).reshape(*batch, 5).unbind(-1)
    inverse_tops = [1 / (one.top or 1.0) for one in found]
    met = [one.verdict.error <= request.tol for one, request in zip(found, requests, strict=True)]
    return DominantDirections(
        U=_lasting(_padded(found, "U", batch, like)),
        S=_padded(found, "S", batch, like) * _factors(sizes, batch, like),
        Vh=_lasting(_padded(found, "Vh", batch, like)),
        edge=edge,
        k=_of_each([one.verdict.k for one in found], batch, like, torch.int64),
        stable_rank=stable,
        spectral_norm=top,
        bulk_edge=bulk_edge,
        residual=_padded(found, "residual", batch, like) * _factors(inverse_tops, batch, like),
        error=error,
        converged=_of_each(met, batch, like, torch.bool),
    )


def _of_each(numbers: list[Any], batch: torch.Size, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What was found of each matrix, ``(*batch, ...)``, where another tensor is."""
    made = torch.tensor(numbers if batch else numbers[0], dtype=dtype or like.dtype, device=like.device)
    return made.reshape(*batch, *made.shape[1:]) if batch else made


def _lasting(made: Tensor) -> Tensor:
    """A tensor that gradients may pass by later, as none of inference mode does."""
    return made.clone() if made.is_inference() else made


def _factors(numbers: list[float], batch: torch.Size, like: Tensor) -> float | Tensor:
    """Of the values of each matrix, ``(*batch, 1)``; a number for a single one."""
    return like.new_tensor(numbers).reshape(*batch, 1) if batch else numbers[0]


def _padded(found: list[Found], name: str, batch: torch.Size, like: Tensor) -> Tensor:
    """One field of all results, ``(*batch, ...)``."""
    parts: list[Tensor] = [getattr(one, name) for one in found]
    if not batch:
        return parts[0]
    if not parts:
        m, n = like.shape[-2:]
        return like.new_zeros(*batch, *{"U": (m, 0), "Vh": (0, n)}.get(name, (0,)))
    missing = [max(one.verdict.k for one in found) - one.verdict.k for one in found]
    pads = [(0, 0, 0, gap) if name == "Vh" else (0, gap) for gap in missing]
    whole = torch.stack([torch.nn.functional.pad(part, pad) for part, pad in zip(parts, pads, strict=True)])
    return whole.reshape(*batch, *whole.shape[1:])


def _check_request(rank: int | None, above: float | Tensor | str | None, tol: float) -> None:
    if rank is not None and above is not None:
        raise ArgumentError("rank and above exclude each other; pass the one that you mean")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 0):
        raise ArgumentError(f"rank must be an integer of at least 0, got {rank!r}; pass None for floor(stable rank)")
    if isinstance(above, str) and above != "bulk":
        raise ArgumentError(f"above must be a number, a tensor or 'bulk', got {above!r}")
    if not 0 < tol < 1:
        raise ArgumentError(f"tol must lie between 0 and 1 (relative to the Frobenius norm), got {tol!r}")


def _widened(W: Tensor, norms: Tensor) -> Tensor:
    """``W`` in float64: its elements are finite, but its singular values are too large for its own type."""
    if W.dtype == torch.float64 or not bool(torch.isfinite(norms).all()):
        raise NonFiniteError("W has a norm beyond float64 although its elements are finite; scale it down")
    return W.double()


def _requests(
    rank: int | None, above: float | Tensor | str | None, tol: float, batch: torch.Size, norms: Tensor
) -> list[Request]:
    """One request a matrix, levels scaled to ``||W||_F = 1``."""
    if above is None or isinstance(above, str):
        return [Request(rank, None, above == "bulk", tol)] * norms.numel()
    levels = torch.as_tensor(above, dtype=torch.float64, device=norms.device)
    if not bool((levels >= 0).all()):
        raise ArgumentError(f"above must be at least 0, got {above!r}; a level is a singular value")
    try:
        expanded = levels.expand(batch).reshape(-1)
    except RuntimeError as error:
        raise ArgumentError(
            f"above must be a number or have the batch shape {tuple(batch)}, got {tuple(levels.shape)}"
        ) from error
    scaled = torch.where(norms > 0, expanded / norms, torch.zeros_like(norms)).tolist()
    return [Request(None, level, False, tol) for level in scaled]


def _seed(generator: torch.Generator | None) -> int:
    """A seed drawn from the user's generator, on whatever device it lives, or our own."""
    if generator is None:
        return _SEED
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def checked_matrices(W: Tensor) -> Tensor:
    """``W`` detached, in float32 or wider; whether it is finite shows in :func:`frobenius_norm`.

    Args:
        W: what a user passed as matrices.

    Returns:
        The same values in a dtype to compute in.

    Raises:
        ArgumentError: no floating tensor of at least two non-empty dimensions.
    """
    if not isinstance(W, Tensor) or not W.is_floating_point() or W.dim() < 2 or 0 in W.shape[-2:]:
        seen = f"{W.dtype} {tuple(W.shape)}" if isinstance(W, Tensor) else type(W).__name__
        raise ArgumentError(
            f"W must be a floating tensor of shape (..., m, n) with m, n >= 1, got {seen}; "
            "reshape the weight to the matrices that it acts as"
        )
    W = W.detach()
    return W if W.dtype in (torch.float32, torch.float64) else W.float()


def frobenius_norm(W: Tensor) -> Tensor:
    """Frobenius norm of ``W (B, m, n)`` that neither overflows nor underflows.

    Args:
        W: matrices in the dtype to compute in.

    Returns:
        float64 norms ``(B,)``; rows in the dtype of ``W``, their combination in float64.

    Raises:
        NonFiniteError: ``W`` holds NaN or infinity.
    """
    total = _by_rows(W)
    least = 1e3 * math.sqrt(torch.finfo(W.dtype).tiny) * W.shape[2]
    if all(least < norm < math.inf for norm in total.tolist()):
        return total
    peak = torch.linalg.vector_norm(W, float("inf"), dim=(1, 2), keepdim=True)
    if not bool(torch.isfinite(peak).all()):
        raise NonFiniteError(_NOT_FINITE)
    # By powers of two, so that the norm is the same but for its scale.
    exponent = torch.frexp(peak.double()).exponent.clamp(-1022, 1022)
    return torch.ldexp(_by_rows(torch.ldexp(W.double(), -exponent).to(W.dtype)), exponent[:, 0, 0])


def _by_rows(W: Tensor) -> Tensor:
    rows = torch.linalg.vector_norm(W, dim=2)
    total: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return total
