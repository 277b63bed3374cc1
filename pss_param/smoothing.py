# SPDX-License-Identifier: Apache-2.0
r"""Smoothing of dominant singular values: edges, shapes, and the low-rank correction they amount to.

A smoothing is two choices: the *edge*, the level to which dominant values are brought, and the *shape* ``f`` with
which they come down to it. What is taken away has low rank, so a smoothed matrix is never formed where its factors
will do:

.. math:: W^* = W - U_k \, \mathrm{diag}(S_k - f(S_k)) \, V_k^H

Edges (:data:`EDGES`); the formulas other than ``dominant`` are ours:

``dominant``
    ``S[k]`` with ``k = floor(SR(W))``, or the ``rank`` given: the published choice.
``bulk``
    the Marchenko-Pastur edge of the matrix's own bulk: the largest fixed point of
    ``c = (sqrt(m) + sqrt(n)) * rms(S clipped at c)``, ``rms = ||.||_F / sqrt(m n)``.
``init``
    the spectral norm of a fresh matrix of this shape, ``(sqrt(m) + sqrt(n)) * std``.
``reference``
    the same weight's ``S[0]`` in a healthy checkpoint.

Where the edge comes out as zero (rank-deficient matrices have no bulk; an exactly low-rank one has ``S[k] = 0``)
there is no level to come down to, only annihilation; such a matrix is left as it is and ``Correction.edge`` is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pss_param.errors import ArgumentError, NonFiniteError
from pss_param.spectrum import DominantDirections, checked_matrices, dominant_directions

ShapeFunction = Callable[[Tensor, Tensor], Tensor]

EDGES = ("dominant", "bulk", "init", "reference")

# Rows of W that one step of an in-place correction holds in float32 beside the stored dtype.
_ROW_BLOCK_ELEMENTS = 1 << 22


def clip(S: Tensor, edge: Tensor) -> Tensor:
    r"""``f(s) = min(s, edge)``; idempotent at a fixed edge.

    Args:
        S: dominant singular values in descending order, ``(k,)``.
        edge: the level to come down to, a scalar tensor.

    Returns:
        The new values, ``(k,)``.

    Example:
        >>> clip(torch.tensor([9.0, 3.0]), torch.tensor(2.0)).tolist()
        [2.0, 2.0]
    """
    return torch.minimum(S, edge)


def softplus(S: Tensor, edge: Tensor) -> Tensor:
    r"""A smooth minimum of ``s`` and the edge, shifted so that it leaves the edge itself where it is.

    .. math:: f(s) = s - \tau \left[\log(1 + e^{(s - c)/\tau}) - \log 2\right], \qquad \tau = c / 4

    Rises from ``c`` with slope 1/2 and saturates at ``c (1 + log(2) / 4)``. Our formula: without the shift, values
    just above the edge would fall below the tail and order would be lost.

    Args:
        S: dominant singular values in descending order, ``(k,)``.
        edge: the level ``c`` to come down to, a scalar tensor.

    Returns:
        The new values, ``(k,)``.

    Example:
        >>> [round(x, 4) for x in softplus(torch.tensor([400.0, 4.0]), torch.tensor(4.0)).tolist()]
        [4.6931, 4.0]
    """
    width = edge / 4
    x = ((S - edge) / width).clamp_min(0)
    # s - tau softplus(x) = c - tau log1p(exp(-x)) without the cancellation of two large terms
    return torch.where(S > edge, edge + width * (math.log(2.0) - torch.log1p(torch.exp(-x))), S)


def log(S: Tensor, edge: Tensor) -> Tensor:
    r"""The published logarithm, scaled so that it meets the edge smoothly.

    .. math:: f(s) = c \,(1 + \log(s / c)) \quad \text{above the edge } c, \text{ else } s

    Args:
        S: dominant singular values in descending order, ``(k,)``.
        edge: the level to come down to, a scalar tensor.

    Returns:
        The new values, ``(k,)``.

    Example:
        >>> [round(x, 4) for x in log(torch.tensor([2.0 * math.e, 1.0]), torch.tensor(2.0)).tolist()]
        [4.0, 1.0]
    """
    return torch.where(S > edge, edge * (1 + torch.log(S / edge)), S)


def softmax(S: Tensor, edge: Tensor) -> Tensor:
    r"""Softmax of the shares, ``softmax(S / sum(S)) * sum(S)``: nearly equal values whose sum is kept.

    The ratio of two values becomes ``exp(p_i - p_j)`` with ``p = S / sum(S)``, never more than ``p_i / p_j``; so the
    largest falls, the smallest rises, order stays. The edge only says which values take part.

    Args:
        S: dominant singular values in descending order, ``(k,)``.
        edge: not used.

    Returns:
        The new values, ``(k,)``.

    Example:
        >>> [round(x, 3) for x in softmax(torch.tensor([3.0, 1.0]), torch.tensor(0.5)).tolist()]
        [2.49, 1.51]
    """
    total = S.sum()
    return torch.softmax(S / total, dim=0) * total


def convolution(S: Tensor, edge: Tensor) -> Tensor:
    r"""A window of three, equal weights, over the descending values, the ends repeated; the sum is kept.

    The window is a symmetric doubly stochastic matrix, hence the sum, the order, and the first value that cannot
    rise.

    Args:
        S: dominant singular values in descending order, ``(k,)``.
        edge: not used.

    Returns:
        The new values, ``(k,)``.

    Example:
        >>> convolution(torch.tensor([9.0, 3.0, 3.0]), torch.tensor(1.0)).tolist()
        [7.0, 5.0, 3.0]
    """
    padded = torch.cat([S[:1], S, S[-1:]])
    return (padded[:-2] + padded[1:-1] + padded[2:]) / 3


def second(S: Tensor, edge: Tensor) -> Tensor:
    r"""``S[0] := S[1]`` and nothing else: the simplest rule, an ablation.

    Args:
        S: dominant singular values in descending order, ``(k,)``.
        edge: stands in for ``S[1]`` where only one value is dominant.

    Returns:
        The new values, ``(k,)``.

    Example:
        >>> second(torch.tensor([9.0, 4.0, 3.0]), torch.tensor(1.0)).tolist()
        [4.0, 4.0, 3.0]
    """
    return torch.cat([S[1:2] if S.numel() > 1 else edge.reshape(1), S[1:]])


SHAPES: dict[str, ShapeFunction] = {
    "clip": clip,
    "softplus": softplus,
    "log": log,
    "softmax": softmax,
    "convolution": convolution,
    "second": second,
}
"""Shapes that act on dominant singular values; any callable with the same signature will do in their place."""

WHOLE_MATRIX_SHAPES = ("equal", "noise")
"""Ablations that act on the whole matrix and ignore the edge."""


@dataclass(frozen=True)
class Smoothing:
    r"""How a matrix is smoothed.

    Attributes:
        shape: a name of :data:`SHAPES`, ``"equal"``, ``"noise"``, or a callable ``f(S, edge) -> S`` on descending
            values ``(k,)``.
        edge: a name of :data:`EDGES`.
        rank: fixes ``k`` of the ``dominant`` edge; ``None`` means ``floor(SR)``.
        init_std: standard deviation of a fresh weight for ``init``; ``None`` means PyTorch's ``Linear``, ``1 /
            sqrt(3 n)``.
        reference: spectral norm of the healthy weight, needed by ``reference``.
        tol: error of the smoothed matrix that is good enough, over ``||W||_F``.

    Raises:
        ArgumentError: an unknown name or a value out of range.

    Example:
        >>> round(Smoothing(edge="init", init_std=0.02).level(100, 300), 4)
        0.5464
    """

    shape: str | ShapeFunction = "clip"
    edge: str = "dominant"
    rank: int | None = None
    init_std: float | None = None
    reference: float | None = None
    tol: float = 1e-3

    def __post_init__(self) -> None:
        names = (*SHAPES, *WHOLE_MATRIX_SHAPES)
        if not callable(self.shape) and self.shape not in names:
            raise ArgumentError(
                f"smoothing must be one of {', '.join(names)} or a callable f(S, edge), got {self.shape!r}"
            )
        if self.edge not in EDGES:
            raise ArgumentError(f"edge must be one of {', '.join(EDGES)}, got {self.edge!r}")
        if self.rank is not None and self.edge != "dominant":
            raise ArgumentError(f"rank fixes k of the 'dominant' edge, got edge {self.edge!r}; drop one of the two")
        if self.rank is not None and (not isinstance(self.rank, int) or self.rank < 1):
            raise ArgumentError(
                f"rank must be an integer of at least 1, got {self.rank!r}; pass None for floor(stable rank)"
            )
        for name in ("init_std", "reference"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ArgumentError(f"{name} must be positive and finite, got {value!r}")
        if not 0 < self.tol < 1:
            raise ArgumentError(f"tol must lie between 0 and 1 (relative to the Frobenius norm), got {self.tol!r}")

    def level(self, m: int, n: int) -> float:
        """The level of an edge that does not depend on the matrix: ``init`` or ``reference``.

        Args:
            m: rows.
            n: columns, the fan-in.

        Returns:
            The level, in the units of the weight.

        Raises:
            ArgumentError: ``edge="reference"`` without ``reference``, or an edge that depends on the matrix.
        """
        if self.edge == "init":
            std = self.init_std if self.init_std is not None else 1 / math.sqrt(3 * n)
            return (math.sqrt(m) + math.sqrt(n)) * std
        if self.edge == "reference" and self.reference is not None:
            return self.reference
        raise ArgumentError("edge='reference' needs the healthy weight's spectral norm; pass Smoothing(reference=...)")


@dataclass(frozen=True)
class Correction:
    r"""What a smoothing takes away, in factors: :math:`W^* = W - U \,\mathrm{diag}(d)\, V^H`.

    Attributes:
        U: left directions, ``(..., m, r)``, float32 or wider.
        d: how much each value falls, ``S - f(S)``, ``(..., r)``; negative where a sum-keeping shape raises a value.
        Vh: right directions, ``(..., r, n)``.
        S: the dominant values before, ``(..., r)``; zero beyond a matrix's own ``k``.
        k: dominant values of each matrix, ``(...)``.
        edge: the level they came down to, ``(...)``; 0 where there is none and the matrix is left as it is.
        stable_rank: before, ``(...)``.
        spectral_norm: before, ``(...)``.
        residual: of each triplet, relative to ``S[0]``, ``(..., r)``.
        error: certified bound on the error of the smoothed matrix over ``||W||_F``, ``(...)``.
        converged: whether that is within the asked tolerance, ``(...)``.
    """

    U: Tensor
    d: Tensor
    Vh: Tensor
    S: Tensor
    k: Tensor
    edge: Tensor
    stable_rank: Tensor
    spectral_norm: Tensor
    residual: Tensor
    error: Tensor
    converged: Tensor

    @property
    def is_noop(self) -> bool:
        """Whether no direction changes; reads one flag from the device."""
        return self.d.numel() == 0 or not bool(self.d.any())

    @torch.no_grad()
    def apply(self, W: Tensor) -> Tensor:
        """The smoothed matrix as a new tensor.

        Args:
            W: the matrix that the correction was computed from, ``(..., m, n)``.

        Returns:
            ``W - U diag(d) Vh`` in the dtype of ``W``: arithmetic in float32 or wider, one cast; ``W``'s own bits
            where nothing changes.

        Raises:
            NonFiniteError: the smoothed values do not fit the dtype of ``W``.
        """
        return self.apply_(W.clone(memory_format=torch.contiguous_format))

    @torch.no_grad()
    def apply_(self, W: Tensor) -> Tensor:
        """The same in place, holding blocks of rows in float32 rather than the whole matrix.

        Args:
            W: the matrix that the correction was computed from, ``(..., m, n)``; may be a strided view.

        Returns:
            ``W`` itself.

        Raises:
            NonFiniteError: the smoothed values do not fit the dtype of ``W``; then some rows may have been written.
        """
        if self.is_noop:
            return W
        with torch.autocast(W.device.type, enabled=False):
            left = self.U * self.d[..., None, :]
            rows = max(1, _ROW_BLOCK_ELEMENTS // max(1, W.numel() // W.shape[-2]))
            for start in range(0, W.shape[-2], rows):
                _subtract_(W[..., start : start + rows, :], left[..., start : start + rows, :], self.Vh)
        return W


def _subtract_(block: Tensor, left: Tensor, right: Tensor) -> None:
    if block.dtype == left.dtype and block.dim() == 2:
        block.addmm_(left, right, alpha=-1)
        return
    smoothed = (block.to(left.dtype) - left @ right).to(block.dtype)
    if block.dtype == torch.float16 and not bool(torch.isfinite(smoothed).all()):
        raise NonFiniteError(
            "smoothed values must fit the stored dtype, but they overflow float16; store the weight in float32"
        )
    block.copy_(smoothed)


@torch.no_grad()
def correction(
    W: Tensor, smoothing: Smoothing, *, generator: torch.Generator | None = None, init: Tensor | None = None
) -> Correction:
    r"""What ``smoothing`` takes away from ``W``, as factors.

    Args:
        W: matrices ``(..., m, n)``, any floating dtype.
        smoothing: shape, edge and tolerance.
        generator: source of the random sketch (and of ``noise``); ``None`` means our own with a fixed seed.
        init: right directions known from before, ``(..., n, r)``, for a warm start.

    Returns:
        The correction, with what was seen of the spectrum.

    Raises:
        ArgumentError: a wrong shape or dtype, or an edge without its level.
        NonFiniteError: ``W`` holds NaN or infinity.

    Example:
        >>> W = torch.diag(torch.tensor([6.0, 2.0, 1.0]))
        >>> c = correction(W, Smoothing(rank=1))
        >>> round(float(c.d[0]), 4), round(float(c.edge), 4), c.apply(W)[0, 0].item()
        (4.0, 2.0, 2.0)
    """
    if smoothing.shape == "equal":
        return _equal(checked_matrices(W))
    if smoothing.shape == "noise":
        return _noise(checked_matrices(W), smoothing, generator)
    found, level = _dominant_set(W, smoothing, generator, init)
    # No level to come down to: Correction.edge == 0 and nothing changes.
    rounding = torch.finfo(found.S.dtype).eps * max(W.shape[-2:])
    level = torch.where(level > rounding * found.spectral_norm, level, torch.zeros_like(level))
    return _from_triplets(found, level, _falls(found, level, _shape_function(smoothing)))


def smooth(
    W: Tensor,
    smoothing: str | ShapeFunction | Smoothing = "clip",
    edge: str = "dominant",
    rank: int | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Smooth the dominant singular values of ``W``.

    .. math:: W^* = W - U_k \, \mathrm{diag}(S_k - f(S_k)) \, V_k^H

    Scale-equivariant for the edges ``dominant`` and ``bulk``. Never raises ``S[0]``; keeps order; values below the
    edge stay. ``clip`` at ``bulk``, ``init`` and ``reference`` is idempotent; at ``dominant`` it is not, since a
    clipped matrix has a larger stable rank and so a larger dominant set.

    Args:
        W: matrices ``(..., m, n)``, any floating dtype.
        smoothing: name of a shape, a callable ``f(S, edge)``, or a :class:`Smoothing`, which then says everything.
        edge: name of an edge.
        rank: fixes ``k`` of the ``dominant`` edge.
        generator: source of the random sketch; ``None`` means our own with a fixed seed.

    Shape:
        ``(..., m, n)`` to ``(..., m, n)``, the dtype of ``W``.

    Returns:
        The smoothed matrices, a new tensor.

    Raises:
        ArgumentError: an unknown name, a wrong shape or dtype.
        NonFiniteError: ``W`` holds NaN or infinity, or the result does not fit its dtype.

    Example:
        >>> W = torch.diag(torch.tensor([8.0, 2.0, 2.0, 2.0]))
        >>> torch.linalg.svdvals(smooth(W, rank=1)).tolist()
        [2.0, 2.0, 2.0, 2.0]

    References:
        Parametric Singularity Smoothing, arXiv 2602.01308.
    """
    if isinstance(smoothing, Smoothing):
        if edge != "dominant" or rank is not None:
            raise ArgumentError("a Smoothing carries its own edge and rank; set them there")
        chosen = smoothing
    else:
        chosen = Smoothing(smoothing, edge, rank)
    return correction(W, chosen, generator=generator).apply(W)


def _shape_function(smoothing: Smoothing) -> ShapeFunction:
    return smoothing.shape if callable(smoothing.shape) else SHAPES[smoothing.shape]


def _dominant_set(
    W: Tensor, smoothing: Smoothing, generator: torch.Generator | None, init: Tensor | None
) -> tuple[DominantDirections, Tensor]:
    """The dominant triplets and the level that they come down to."""
    if smoothing.edge == "dominant":
        rank = smoothing.rank
        if smoothing.shape == "second":
            rank = 1
        if rank is not None and W.dim() >= 2:
            rank = min(rank, min(W.shape[-2:]) - 1)  # one value must be left to be the edge
        found = dominant_directions(W, rank, tol=smoothing.tol, generator=generator, init=init)
        return found, found.edge
    if smoothing.edge == "bulk":
        found = dominant_directions(W, above="bulk", tol=smoothing.tol, generator=generator, init=init)
        return found, found.bulk_edge
    level = smoothing.level(*W.shape[-2:]) if W.dim() >= 2 else 0.0
    found = dominant_directions(W, above=level, tol=smoothing.tol, generator=generator, init=init)
    return found, torch.full_like(found.edge, level)


def _falls(found: DominantDirections, level: Tensor, shape: ShapeFunction) -> Tensor:
    """``d = S - f(S)`` of every matrix; zero where there is no level."""
    r = found.S.shape[-1]
    S = found.S.reshape(found.k.numel(), r)
    counts = found.k.reshape(-1).tolist()
    levels = level.reshape(-1)
    open_ = (levels > 0).tolist()
    rows = []
    for i, k in enumerate(counts):
        fall = S[i, :k] - _shaped(S[i, :k], levels[i], shape) if k and open_[i] else S.new_zeros(k)
        rows.append(torch.nn.functional.pad(fall, (0, r - fall.numel())))
    return torch.stack(rows).reshape(found.S.shape) if rows else torch.zeros_like(found.S)


def _shaped(S: Tensor, edge: Tensor, shape: ShapeFunction) -> Tensor:
    new = shape(S, edge)
    if not isinstance(new, Tensor) or new.shape != S.shape:
        seen = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise ArgumentError(
            f"a smoothing function must map (k,) values to (k,) values, got {seen} from {tuple(S.shape)}"
        )
    if not bool(torch.isfinite(new).all()):
        raise NonFiniteError(
            "a smoothing function must return finite values, got NaN or infinity; check its use of the edge"
        )
    return new.to(S.dtype)


def _from_triplets(found: DominantDirections, level: Tensor, d: Tensor) -> Correction:
    return Correction(
        U=found.U,
        d=d,
        Vh=found.Vh,
        S=found.S,
        k=found.k,
        edge=level,
        stable_rank=found.stable_rank,
        spectral_norm=found.spectral_norm,
        residual=found.residual,
        error=found.error,
        converged=found.converged,
    )


def _equal(W: Tensor) -> Correction:
    r"""All singular values equal at constant Frobenius norm: the MSign rule (arXiv 2602.01734), an ablation."""
    found = dominant_directions(W, rank=min(W.shape[-2:]))
    nonzero = found.S > torch.finfo(found.S.dtype).eps * max(W.shape[-2:]) * found.S[..., :1]
    count = nonzero.sum(dim=-1, keepdim=True).clamp_min(1)
    level = (found.S.square().sum(dim=-1, keepdim=True) / count).sqrt()
    return _from_triplets(found, level[..., 0], torch.where(nonzero, found.S - level, torch.zeros_like(found.S)))


def _noise(W: Tensor, smoothing: Smoothing, generator: torch.Generator | None) -> Correction:
    """Control: Gaussian noise of the size that ``clip`` at the same edge would have taken away; smooths nothing."""
    found, level = _dominant_set(W, smoothing, generator, None)
    size = torch.linalg.vector_norm(_falls(found, level, clip), dim=-1)
    source = generator if generator is not None else torch.Generator().manual_seed(0x50555)
    noise = torch.randn(W.shape, generator=source, device=source.device, dtype=torch.float32).to(W)
    noise = noise * (size / torch.linalg.vector_norm(noise, dim=(-2, -1)))[..., None, None]
    identity = torch.eye(W.shape[-1], dtype=W.dtype, device=W.device).expand(*W.shape[:-2], -1, -1)
    whole = DominantDirections(
        -noise, W.new_ones(*W.shape[:-2], W.shape[-1]), identity, found.edge, found.k, found.stable_rank,
        found.spectral_norm, found.bulk_edge, torch.zeros_like(identity[..., 0]), found.error, found.converged,
    )  # fmt: skip
    return _from_triplets(whole, level, torch.ones_like(whole.S))
