# SPDX-License-Identifier: Apache-2.0
r"""Spectra of weight matrices: stable rank, spectral norm and certified dominant directions.

Pure functions on ``(..., m, n)``: any floating dtype in, arithmetic in float32 or wider with autocast off, no
gradients, no global random state. Batches are worked on in chunks that fit a memory budget.

# Note [Which algorithm serves which matrix]
Every matrix starts on the block Krylov iteration of :mod:`pss_param.krylov`. Its measured residuals decide when it
stops and its Ritz values decide how wide the block must be. When the basis that the wanted values need would fill
half of the smaller dimension, thin products no longer pay, and the whole spectrum is computed instead; so tiny
matrices, flat spectra with many wanted values, and tolerances beyond the reach of an iteration all end there,
without a size being written down anywhere.

# Note [What the certificate says]
Let ``h(s) = s - f(s)`` be what a smoothing takes from a singular value: zero up to the edge ``c`` and 1-Lipschitz
above it, so ``W* = W - h(W)``. Rayleigh-Ritz gives orthonormal ``U, V`` with ``W V = U S`` and ``R = W^T U - V S``.
Then ``U, S, V`` are exact triplets of ``W - U R^T``, and a Lipschitz function of singular values is Lipschitz in the
Frobenius norm, so the error of the smoothed matrix is at most ``||R||_F``. A triplet near the edge converges last
but hardly moves: leaving triplets ``j+1 .. k`` out changes the correction by their ``h(s) <= s - c``, and so, for
every ``j``,

    error <= ||R[:j]||_F + 2 ||(S - c)[j:k]||_2 + ||(S + |R| - c)_+[k:]||_2 + sqrt(k) * |c - c_exact| + rounding,

where the third term is what Ritz values below the edge may hide, each having a true value within its own residual,
and of which the smallest over ``j`` is taken. The error of the edge obeys Weyl's bound ``||R[:k+1]||`` and the
quadratic one ``||R[:j]||^2 / (S[k] - S[j])`` (Mathias 1998); the smaller counts. That no direction above the edge
was missed altogether is certain only in probability: the start is Gaussian and wider than the wanted set (Note
[Width of the block]).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pss_param.errors import ArgumentError, NonFiniteError
from pss_param.krylov import Krylov, Ritz

# Note [An integer stable rank]: k copies of one value have SR = k exactly, and rounding must not decide between k and
# k - 1. A stable rank within this relative distance below an integer counts as the integer, on every device alike.
STABLE_RANK_SLACK = 1e-4

_FIRST_BLOCK = 16
_OVERSAMPLING = 6
# Below this level (over ||W||_F) the bulk's energy is lost in the rounding of a difference and is summed value by
# value.
_FAINT_BULK = 1e-3
_CPU_CHUNK = 1 << 18  # elements of W worked on at once; larger batches of larger matrices do not run faster on a CPU
_CUDA_CHUNK = 1 << 29


@dataclass(frozen=True)
class DominantDirections:
    r"""The top of a spectrum with its certificate.

    Columns at or beyond a matrix's own ``k`` are zero where a batch holds matrices of different ``k``; ``r`` is the
    largest.

    Attributes:
        U: left directions, ``(..., m, r)``.
        S: singular values in descending order, ``(..., r)``.
        Vh: right directions, ``(..., r, n)``.
        edge: the first value not taken, ``S[k]``, ``(...)``; zero when all were taken.
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
        NonFiniteError: ``W`` holds NaN or infinity.

    Example:
        >>> found = dominant_directions(torch.diag(torch.tensor([5.0, 3.0, 1.0])), rank=1)
        >>> round(float(found.S[0]), 4), round(float(found.edge), 4), int(found.k)
        (5.0, 3.0, 1)

    References:
        PSS, arXiv 2602.01308 (the decomposition, ``k``); Halko, Martinsson and Tropp, SIAM Review 53 (2011).
    """
    W = checked_matrices(W)
    _check_request(W, rank, above, tol)
    batch, (m, n) = W.shape[:-2], W.shape[-2:]
    flat = W.reshape(-1, m, n)
    levels = None if above is None or isinstance(above, str) else _levels(above, flat, batch)
    request = _Request(rank, above == "bulk" if isinstance(above, str) else False, levels, tol)
    with torch.autocast(W.device.type, enabled=False):
        found = _in_chunks(flat, request, generator, init)
    return DominantDirections(
        *(getattr(found, f.name).unflatten(0, batch) if batch else getattr(found, f.name)[0] for f in fields(found))
    )


def checked_matrices(W: Tensor) -> Tensor:
    """``W`` detached, in float32 or wider.

    Args:
        W: what a user passed as matrices.

    Returns:
        The same values in a dtype to compute in.

    Raises:
        ArgumentError: no floating tensor of at least two non-empty dimensions.
        NonFiniteError: NaN or infinity inside.
    """
    if not isinstance(W, Tensor) or not W.is_floating_point() or W.dim() < 2 or 0 in W.shape[-2:]:
        seen = f"{W.dtype} {tuple(W.shape)}" if isinstance(W, Tensor) else type(W).__name__
        raise ArgumentError(
            f"W must be a floating tensor of shape (..., m, n) with m, n >= 1, got {seen}; "
            "reshape the weight to the matrices that it acts as"
        )
    W = W.detach()
    W = W if W.dtype in (torch.float32, torch.float64) else W.float()
    # A sum of absolute values in a wider type overflows only where a value was infinite or NaN already.
    if not bool(torch.isfinite(W.sum(dim=-1, dtype=torch.float64)).all()):
        raise NonFiniteError(
            "W must be finite, got NaN or infinity; take the weight from a checkpoint before the blow-up"
        )
    return W


@dataclass(frozen=True)
class _Request:
    """What to find: ``rank`` values, ``floor(SR)`` of them (both None), those above ``levels``, or above the bulk."""

    rank: int | None
    bulk: bool
    levels: Tensor | None  # (B,)
    tol: float

    def part(self, rows: slice) -> _Request:
        return _Request(self.rank, self.bulk, None if self.levels is None else self.levels[rows], self.tol)

    def scaled(self, scale: Tensor) -> _Request:
        return _Request(self.rank, self.bulk, None if self.levels is None else self.levels / scale, self.tol)


@dataclass(frozen=True)
class _Verdict:
    """What a set of Ritz values amounts to; all ``(B,)``, scaled to ``||W||_F = 1``."""

    k: Tensor
    edge: Tensor
    bulk_edge: Tensor
    error: Tensor
    enough: Tensor


def _check_request(W: Tensor, rank: int | None, above: float | Tensor | str | None, tol: float) -> None:
    if rank is not None and above is not None:
        raise ArgumentError("rank and above exclude each other; pass the one that you mean")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 0):
        raise ArgumentError(f"rank must be an integer of at least 0, got {rank!r}; pass None for floor(stable rank)")
    if isinstance(above, str) and above != "bulk":
        raise ArgumentError(f"above must be a number, a tensor or 'bulk', got {above!r}")
    if not 0 < tol < 1:
        raise ArgumentError(f"tol must lie between 0 and 1 (relative to the Frobenius norm), got {tol!r}")


def _levels(above: float | Tensor, flat: Tensor, batch: torch.Size) -> Tensor:
    levels = torch.as_tensor(above, dtype=flat.dtype, device=flat.device)
    if not bool((levels >= 0).all()):
        raise ArgumentError(f"above must be at least 0, got {above!r}; a level is a singular value")
    try:
        return levels.expand(batch).reshape(-1)
    except RuntimeError as error:
        raise ArgumentError(
            f"above must be a number or have the batch shape {tuple(batch)}, got {tuple(levels.shape)}"
        ) from error


def _in_chunks(
    flat: Tensor, request: _Request, generator: torch.Generator | None, init: Tensor | None
) -> DominantDirections:
    budget = _CUDA_CHUNK if flat.is_cuda else _CPU_CHUNK
    size = max(1, budget // (flat.shape[1] * flat.shape[2]))
    state = None if generator is None else generator.get_state()
    if init is not None:
        init = init.reshape(-1, *init.shape[-2:]).to(flat)
    parts = []
    for start in range(0, flat.shape[0], size):
        rows = slice(start, start + size)
        source = _generator(flat.device, state)  # every chunk draws the same sketch: no result depends on its batch
        parts.append(_solve(flat[rows], request.part(rows), source, None if init is None else init[rows]))
    if generator is not None:
        torch.randint(2, (), generator=generator, device=generator.device)  # a second call shall draw anew
    return _concatenated(parts)


def _generator(device: torch.device, state: Tensor | None) -> torch.Generator:
    source = torch.Generator("cpu")  # the same sketch on every device, so that devices agree to rounding
    if state is None or state.numel() != source.get_state().numel():
        return source.manual_seed(0x50555)
    source.set_state(state)
    return source


def _concatenated(parts: list[DominantDirections]) -> DominantDirections:
    if len(parts) == 1:
        return parts[0]
    width = max(part.S.shape[-1] for part in parts)
    columns = {"U": -1, "S": -1, "residual": -1, "Vh": -2}

    def wide(part: DominantDirections, name: str) -> Tensor:
        value: Tensor = getattr(part, name)
        if name not in columns:
            return value
        missing = width - part.S.shape[-1]
        pad = (0, missing) if columns[name] == -1 else (0, 0, 0, missing)
        return torch.nn.functional.pad(value, pad)

    return DominantDirections(*(torch.cat([wide(p, f.name) for p in parts]) for f in fields(DominantDirections)))


def _solve(W: Tensor, request: _Request, source: torch.Generator, init: Tensor | None) -> DominantDirections:
    if W.shape[1] < W.shape[2]:  # the Krylov basis lives on the smaller side
        start = None if init is None else W @ init
        return _transposed(_solve_tall(W.mT, request, source, start))
    return _solve_tall(W, request, source, init)


def _transposed(found: DominantDirections) -> DominantDirections:
    values = {f.name: getattr(found, f.name) for f in fields(found)}
    values["U"], values["Vh"] = found.Vh.mT, found.U.mT
    return DominantDirections(**values)


def frobenius_norm(W: Tensor) -> Tensor:
    """Frobenius norm of ``W (B, m, n)`` that neither overflows nor underflows.

    Args:
        W: finite matrices in the dtype to compute in.

    Returns:
        float64 norms ``(B,)``; rows in the dtype of ``W``, their combination in float64.
    """
    total = torch.linalg.vector_norm(torch.linalg.vector_norm(W, dim=2).double(), dim=1)
    tiny = 1e3 * math.sqrt(torch.finfo(W.dtype).tiny)
    if bool((torch.isfinite(total) & (total > tiny * W.shape[2])).all()):
        return total
    peak = torch.linalg.vector_norm(W, float("inf"), dim=(1, 2), keepdim=True)
    safe = torch.where(peak > 0, peak, torch.ones_like(peak))
    return torch.linalg.vector_norm((W / safe).double(), dim=(1, 2)) * peak[:, 0, 0].double()


def _solve_tall(W: Tensor, request: _Request, source: torch.Generator, init: Tensor | None) -> DominantDirections:
    norm = frobenius_norm(W)
    scale = torch.where(norm > 0, norm, torch.ones_like(norm))
    scaled = request.scaled(scale.to(W.dtype))
    n = W.shape[2]
    width = max(_FIRST_BLOCK, (request.rank or 0) + _OVERSAMPLING)
    if 4 * width > n:
        return _dense(W, norm, scale, scaled)
    krylov = Krylov(W, scale, source)
    krylov.start(width, init)
    while True:
        ritz = krylov.ritz()
        verdict = _verdict(ritz.S, ritz.residual, scaled, W.shape[1:], krylov.rank)
        missing = int(verdict.k.max()) + _OVERSAMPLING - krylov.random_columns
        if bool(verdict.enough.all()) and missing <= 0:
            return _result(krylov.triplets, ritz, verdict, norm, scale, scaled)
        fresh = max(0, missing - krylov.young_columns)
        if 2 * (krylov.rank + krylov.next_columns + fresh) > n:
            return _dense(W, norm, scale, scaled)
        krylov.expand(fresh)


def _dense(W: Tensor, norm: Tensor, scale: Tensor, request: _Request) -> DominantDirections:
    U, S, Vh = torch.linalg.svd(W / scale.to(W.dtype)[:, None, None], full_matrices=False)
    eps = torch.finfo(S.dtype).eps
    ritz = Ritz(S, (4 * eps * S[:, :1]).expand_as(S), Vh)
    verdict = _verdict(S, ritz.residual, request, W.shape[1:], S.shape[1])

    def triplets(ritz: Ritz, count: int) -> tuple[Tensor, Tensor, Tensor]:
        return U[:, :, :count], ritz.S[:, :count], Vh[:, :count]

    return _result(triplets, ritz, verdict, norm, scale, request)


def _result(
    triplets: Callable[[Ritz, int], tuple[Tensor, Tensor, Tensor]],
    ritz: Ritz,
    verdict: _Verdict,
    norm: Tensor,
    scale: Tensor,
    request: _Request,
) -> DominantDirections:
    r = int(verdict.k.max())
    taken = (torch.arange(r, device=ritz.S.device) < verdict.k[:, None]).to(ritz.S.dtype)
    U, S, Vh = triplets(ritz, r)
    top, unit = ritz.S[:, 0], scale.to(S.dtype)
    relative = ritz.residual[:, :r] / torch.where(top > 0, top, torch.ones_like(top))[:, None]
    return DominantDirections(
        U=U * taken[:, None, :],
        S=S * taken * unit[:, None],
        Vh=Vh * taken[:, :, None],
        edge=verdict.edge * unit,
        k=verdict.k,
        stable_rank=torch.where(norm > 0, stable_rank_of(top), torch.zeros_like(top)),
        spectral_norm=top * unit,
        bulk_edge=verdict.bulk_edge * unit,
        residual=relative * taken,
        error=verdict.error,
        converged=verdict.error <= request.tol,
    )


def stable_rank_of(top: Tensor) -> Tensor:
    """Stable rank of a matrix with ``||W||_F = 1`` and largest singular value ``top``.

    Args:
        top: ``S[0] / ||W||_F``.

    Returns:
        ``1 / top^2``, at least 1.
    """
    return top.clamp_min(torch.finfo(top.dtype).tiny).square().reciprocal().clamp_min(1.0)


def _verdict(S: Tensor, residual: Tensor, request: _Request, shape: torch.Size, basis: int) -> _Verdict:
    n = min(shape)
    complete = basis >= n
    padded = torch.nn.functional.pad(S, (0, 1))
    energy = residual.square().cumsum(dim=1)
    ceiling = S + residual  # no value of the rest of the matrix is known to lie below this
    top_error = _value_error(S, energy, ceiling, 0)
    bulk_edge = torch.full_like(S[:, 0], float("nan"))
    if request.bulk:
        bulk_edge = bulk_level(S, shape, complete)
        known_tail = complete | (bulk_edge > _FAINT_BULK)
    levels = bulk_edge if request.bulk else request.levels
    if levels is not None:
        k = (S > levels[:, None]).sum(dim=1)
        known = k <= basis - _OVERSAMPLING
        edge = padded.gather(1, k[:, None])[:, 0]
        level, level_error = levels, torch.zeros_like(levels)
        if request.bulk:
            known = known & known_tail
            alpha = sum(math.sqrt(x) for x in shape) / math.sqrt(shape[0] * shape[1])
            taken = energy.gather(1, (k - 1).clamp_min(0)[:, None])[:, 0] * (k > 0)
            level_error = alpha**2 * taken / (2 * levels.clamp_min(torch.finfo(S.dtype).eps))
    else:
        k, known = _count(S, top_error, request.rank, n)
        known = known & (k < basis)
        k = k.clamp_max(basis)
        edge = padded.gather(1, k[:, None])[:, 0]
        level, level_error = edge, _value_error(padded, _padded(energy), _padded(ceiling), k)
        level_error = torch.where(k < basis, level_error, torch.zeros_like(level_error))
    missed = torch.zeros_like(level) if request.rank == 0 else _missed(S, residual, level, k)
    error = _matrix_error(S, residual, level, k) + _rounding(S, shape) + k.to(S.dtype).sqrt() * level_error
    relevant = (missed + torch.where(k > 0, error, torch.zeros_like(error))).maximum(
        top_error / S[:, 0].clamp_min(torch.finfo(S.dtype).tiny) if request.rank == 0 else torch.zeros_like(error)
    )
    enough = (known & (relevant <= request.tol)) | complete
    zero = S[:, 0] <= 0
    bulk_edge = torch.where(zero, torch.zeros_like(bulk_edge), bulk_edge) if request.bulk else bulk_edge
    return _Verdict(k, edge, bulk_edge, torch.where(zero, 0.0, relevant), enough | zero)


def _count(S: Tensor, top_error: Tensor, rank: int | None, n: int) -> tuple[Tensor, Tensor]:
    """``k`` and whether the certified interval of the stable rank leaves no choice."""
    if rank is not None:
        k = torch.full(S.shape[:1], min(rank, n), dtype=torch.int64, device=S.device)
        return k, torch.ones_like(k, dtype=torch.bool)
    high, low = stable_rank_of(S[:, 0]), stable_rank_of(S[:, 0] + top_error)
    slack = 1 + STABLE_RANK_SLACK
    k_high, k_low = (high * slack).floor(), (low * slack).floor()
    decided = (k_high == k_low) | (high - low <= 0.5 * STABLE_RANK_SLACK * high)
    k = torch.where(S[:, 0] > 0, k_high, torch.zeros_like(k_high)).clamp_max(n - 1).to(torch.int64)
    return k, decided | (k_low >= n - 1)


def _padded(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, 1), value=1e9)


def _value_error(S: Tensor, energy: Tensor, ceiling: Tensor, index: int | Tensor) -> Tensor:
    """Bound on how far ``S[index]`` is below the true value: Weyl's and the quadratic one."""
    columns = torch.arange(S.shape[1], device=S.device)
    at = torch.full(S.shape[:1], index, device=S.device) if isinstance(index, int) else index
    value = S.gather(1, at[:, None])
    weyl = energy.gather(1, at[:, None])[:, 0].sqrt()
    gap = value - ceiling[:, 1:]  # to the first value outside the leading j + 1
    eligible = (columns[:-1] >= at[:, None]) & (gap > 0)
    quadratic = torch.where(eligible, energy[:, :-1] / gap.clamp_min(torch.finfo(S.dtype).tiny), float("inf"))
    return torch.minimum(weyl, quadratic.amin(dim=1)) if S.shape[1] > 1 else weyl


def _matrix_error(S: Tensor, residual: Tensor, level: Tensor, k: Tensor) -> Tensor:
    """The bound of Note [What the certificate says] without the edge's own error."""
    taken = torch.arange(S.shape[1], device=S.device) < k[:, None]
    leak = torch.nn.functional.pad((residual * taken).square().cumsum(dim=1), (1, 0))
    move = ((S - level[:, None]).clamp_min(0) * taken).square()
    rest = torch.nn.functional.pad(move.flip(1).cumsum(dim=1).flip(1), (0, 1))
    return (leak.sqrt() + 2 * rest.sqrt()).amin(dim=1)


def _missed(S: Tensor, residual: Tensor, level: Tensor, k: Tensor) -> Tensor:
    """How much of the correction Ritz values below the level may hide: each has a true value within its residual."""
    rest = torch.arange(S.shape[1], device=S.device) >= k[:, None]
    return torch.linalg.vector_norm((S + residual - level[:, None]).clamp_min(0) * rest, dim=1)


def _rounding(S: Tensor, shape: torch.Size) -> float:
    """Rounding of the products that everything is measured with: sums of ``max(m, n)`` terms of random sign."""
    return 4 * torch.finfo(S.dtype).eps * math.sqrt(max(shape))


def bulk_level(S: Tensor, shape: tuple[int, ...], complete: bool) -> Tensor:
    r"""Largest fixed point of ``c = (sqrt(m) + sqrt(n)) * rms(S clipped at c)`` for ``||W||_F = 1``.

    Values that are not in ``S`` are taken as unclipped, so the level of a partial spectrum is an upper bound that is
    exact as soon as it lies above the last value of ``S``.

    Args:
        S: leading singular values in descending order, ``(B, r)``.
        shape: ``(m, n)``.
        complete: whether ``S`` is the whole spectrum; then the tail's energy is summed rather than found by
            difference.

    Returns:
        The level ``(B,)``; zero where the clipping never comes to rest, that is where there is no bulk.
    """
    # With j values clipped, c^2 (1 - j a) = a (1 - sum of their squares), a = (sqrt(m) + sqrt(n))^2 / (m n): one
    # division.
    a = (math.sqrt(shape[0]) + math.sqrt(shape[1])) ** 2 / (shape[0] * shape[1])
    squares = S.double().square()
    j = torch.arange(S.shape[1] + 1, device=S.device, dtype=torch.float64)
    if complete:
        rounding = S.shape[1] * torch.finfo(S.dtype).eps * S[:, :1].double()
        real = torch.where(S > rounding, squares, 0.0)
        tail = torch.nn.functional.pad(real.flip(1).cumsum(dim=1).flip(1), (0, 1))
    else:
        tail = (1.0 - torch.nn.functional.pad(squares.cumsum(dim=1), (1, 0))).clamp_min(0)
    room = 1.0 - a * j
    c2 = torch.where(room > 0, a * tail / room.clamp_min(1e-300), torch.full_like(tail, -1.0))
    # j is right when exactly j values exceed c; the first such j belongs to the largest fixed point.
    below = torch.nn.functional.pad(squares, (0, 1), value=0.0)
    first = ((below <= c2) & (c2 > 0)).to(torch.int8).argmax(dim=1, keepdim=True)
    found = ((below <= c2) & (c2 > 0)).any(dim=1)
    level = c2.gather(1, first)[:, 0].clamp_min(0).sqrt()
    return torch.where(found, level, torch.zeros_like(level)).to(S.dtype)
