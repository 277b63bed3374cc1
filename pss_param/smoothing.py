# SPDX-License-Identifier: Apache-2.0
r"""Smoothing of dominant singular values: edges, shapes, and the low-rank correction they amount to.

A smoothing is two choices: the *edge*, the level to which dominant values are brought, and the *shape* ``f`` with
which they come down to it. What is taken away has low rank, so a smoothed matrix is never formed where its factors
will do:

.. math:: W^* = W - U_k \, \mathrm{diag}(S_k - f(S_k)) \, V_k^H

Edges (:data:`EDGES`); the formulas other than ``dominant`` are ours:

``dominant``
    ``S[k]`` with ``k = floor(SR(W))``, or the ``rank`` given: the published choice.
``mild``
    the higher of ``dominant`` and ``init``, so that what is as large as in a fresh matrix is left alone.
``bulk``
    the Marchenko-Pastur edge of the matrix's own bulk: the largest fixed point of
    ``c = (sqrt(m) + sqrt(n)) * rms(S clipped at c)``, ``rms = ||.||_F / sqrt(m n)``.
``init``
    the spectral norm of a fresh matrix of this shape, ``(sqrt(m) + sqrt(n)) * std``.
``reference``
    the same weight's ``S[0]`` in a healthy checkpoint.
``baseline``
    the same weight's ``S[0]`` while the run was healthy, as a detector remembers it: in a live run only.

Where the edge comes out as zero (rank-deficient matrices have no bulk; an exactly low-rank one has ``S[k] = 0``)
there is no level to come down to, only annihilation; such a matrix is left as it is and ``Correction.edge`` is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pss_param.edges import LIVE_EDGES, EdgeFunction, init_level
from pss_param.errors import ArgumentError, NonFiniteError
from pss_param.lowrank import Correction
from pss_param.shapes import SHAPES, ShapeFunction, clip
from pss_param.spectrum import DominantDirections, checked_matrices, directions_together, dominant_directions

WHOLE_MATRIX_SHAPES = ("equal", "noise")
"""Shapes that act on the whole matrix: ``equal`` heeds no edge but ``init``, ``noise`` smooths nothing."""


_SAME = 1e-4
"""Norms that differ by less, as stable ranks may, are the same."""

LOWERING_SHAPES = ("clip", "softplus", "log")
"""Shapes that bring whatever is above the edge down towards it; the others keep sums, or heed no edge."""


@dataclass(frozen=True)
class Smoothing:
    r"""How a matrix is smoothed.

    Attributes:
        shape: a name of :data:`SHAPES`, ``"equal"``, ``"noise"``, or a callable ``f(S, edge) -> S`` on descending
            values ``(k,)``.
        edge: a name of :data:`LIVE_EDGES`, or a callable from matrices ``(..., m, n)`` to levels ``(...)``.
        rank: fixes ``k`` of the ``dominant`` edge; ``None`` means ``floor(SR)``.
        init_std: standard deviation of a fresh weight for ``init`` and ``mild``; ``None`` means PyTorch's ``Linear``,
            ``1 / sqrt(3 n)``.
        reference: spectral norm of the healthy weight, needed by ``reference``.
        tol: error of the smoothed matrix that is good enough, over ``||W||_F``.

    Raises:
        ArgumentError: an unknown name or a value out of range.

    Example:
        >>> round(Smoothing(edge="init", init_std=0.02).level(100, 300), 4)
        0.5464
    """

    shape: str | ShapeFunction = "clip"
    edge: str | EdgeFunction = "dominant"
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
        if not callable(self.edge) and self.edge not in LIVE_EDGES:
            raise ArgumentError(f"edge must be one of {', '.join(LIVE_EDGES)} or a callable, got {self.edge!r}")
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
            ArgumentError: ``edge="reference"`` without ``reference``, ``edge="baseline"`` outside of a live run, or an
                edge that depends on the matrix.
        """
        if self.edge == "init":
            return init_level(m, n, self.init_std)
        if self.edge == "reference" and self.reference is not None:
            return self.reference
        if self.edge == "baseline":
            raise ArgumentError(
                "edge='baseline' is what a detector remembers of a live run; for a matrix by itself use 'init' or "
                "'reference'"
            )
        raise ArgumentError("edge='reference' needs the healthy weight's spectral norm; pass Smoothing(reference=...)")


def holds(smoothing: Smoothing) -> bool:
    """Whether it holds a weight at its baseline, however often it is applied.

    Args:
        smoothing: shape and edge.

    Returns:
        The answer.

    Example:
        >>> holds(Smoothing(edge="baseline")), holds(Smoothing("noise", "baseline")), holds(Smoothing())
        (True, False, False)
    """
    return smoothing.edge == "baseline" and (callable(smoothing.shape) or smoothing.shape in LOWERING_SHAPES)


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
        return _equal(checked_matrices(W), smoothing)
    if smoothing.shape == "noise":
        return _noise(checked_matrices(W), smoothing, generator)
    found, level = _dominant_set(W, smoothing, generator, init)
    return _smoothed(W, smoothing, found, level)


@torch.no_grad()
def corrections(
    pairs: Sequence[tuple[Tensor, Smoothing]], generator: torch.Generator | None = None
) -> list[Correction]:
    r"""What :func:`correction` gives for each; small matrices on a GPU are decomposed together, whatever their shapes.

    Args:
        pairs: matrices ``(..., m, n)``, all on one device and of one dtype, and a smoothing of each that does not need
            the whole matrix.
        generator: source of the random sketch, which all share.

    Returns:
        One correction a pair, with its errors.

    Example:
        >>> matrices = torch.diag(torch.tensor([6.0, 2.0, 1.0])), torch.eye(2)
        >>> ones = corrections([(W, Smoothing(rank=1)) for W in matrices])
        >>> [one.d.tolist() for one in ones]
        [[4.0], [0.0]]
    """
    asked = [(W, *_wanted(W, smoothing), smoothing.tol) for W, smoothing in pairs]
    found = directions_together(asked, generator)
    return [
        _smoothed(W, smoothing, *_with_level(those, W, smoothing, above))
        for those, (W, smoothing), (_, _, above, _) in zip(found, pairs, asked, strict=True)
    ]


def _smoothed(W: Tensor, smoothing: Smoothing, found: DominantDirections, level: Tensor) -> Correction:
    # No level to come down to: Correction.edge == 0 and nothing changes.
    level = torch.where(level > _rounding(W, smoothing, found), level, torch.zeros_like(level))
    return _from_triplets(found, level, _falls(found, level, _shape_function(smoothing)))


def _rounding(W: Tensor, smoothing: Smoothing, found: DominantDirections) -> Tensor:
    """The level at which there is nothing but rounding: that of the arithmetic, and of how ``W`` is stored."""
    m, n = W.shape[-2:]
    arithmetic = torch.finfo(found.S.dtype).eps * max(m, n) * found.spectral_norm
    if smoothing.edge not in {"dominant", "bulk"}:
        return arithmetic  # a level that does not come from W's own values says nothing of their rounding
    bulk = (math.sqrt(m) + math.sqrt(n)) / math.sqrt(m * n)  # edge of independent errors, over their Frobenius norm
    stored = torch.finfo(W.dtype).eps * bulk * found.stable_rank.sqrt() * found.spectral_norm
    return torch.maximum(arithmetic, stored)


def smooth(
    W: Tensor,
    smoothing: str | ShapeFunction | Smoothing = "clip",
    edge: str | EdgeFunction = "dominant",
    rank: int | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Smooth the dominant singular values of ``W``.

    .. math:: W^* = W - U_k \, \mathrm{diag}(S_k - f(S_k)) \, V_k^H

    Scale-equivariant for the edges ``dominant`` and ``bulk``. Never raises ``S[0]``; keeps order; values below the
    edge stay. ``clip`` at ``bulk``, ``init`` and ``reference`` is idempotent; at ``dominant`` and ``mild`` it is not,
    since a clipped matrix has a larger stable rank and so a larger dominant set.

    Args:
        W: matrices ``(..., m, n)``, any floating dtype.
        smoothing: name of a shape, a callable ``f(S, edge)``, or a :class:`Smoothing`, which then says everything.
        edge: name of an edge, or a callable from matrices to levels.
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
    rank, above = _wanted(W, smoothing)
    found = dominant_directions(W, rank, above=above, tol=smoothing.tol, generator=generator, init=init)
    return _with_level(found, W, smoothing, above)


def _wanted(W: Tensor, smoothing: Smoothing) -> tuple[int | None, float | Tensor | str | None]:
    """The ``rank`` and the level of :func:`pss_param.spectrum.dominant_directions`."""
    if not isinstance(W, Tensor) or W.dim() < 2:
        checked_matrices(W)  # says what is wrong
    if smoothing.edge in {"dominant", "mild"}:
        rank = 1 if smoothing.shape == "second" else smoothing.rank
        return None if rank is None else min(rank, min(W.shape[-2:]) - 1), None  # one must be left to be the edge
    if smoothing.edge == "bulk":
        return None, "bulk"
    return None, smoothing.edge(W) if callable(smoothing.edge) else smoothing.level(*W.shape[-2:])


def _with_level(
    found: DominantDirections, W: Tensor, smoothing: Smoothing, above: float | Tensor | str | None
) -> tuple[DominantDirections, Tensor]:
    if smoothing.edge == "dominant":
        return found, found.edge
    if smoothing.edge == "mild":
        m, n = W.shape[-2:]
        return _above(found, found.edge.clamp_min(init_level(m, n, smoothing.init_std)))
    if smoothing.edge == "bulk":
        return found, found.bulk_edge
    return found, torch.as_tensor(above, dtype=found.edge.dtype, device=found.edge.device).expand_as(found.edge)


def _above(found: DominantDirections, level: Tensor) -> tuple[DominantDirections, Tensor]:
    """Only those of the triplets that are above a level which is nowhere below the edge."""
    k = torch.minimum(found.k, (found.S > level[..., None]).sum(-1))
    r = int(k.max()) if k.numel() else 0
    taken = torch.arange(r, device=k.device) < k[..., None]
    U, S, Vh = found.U[..., :r], found.S[..., :r], found.Vh[..., :r, :]
    kept = {"U": U * taken[..., None, :], "S": S * taken, "Vh": Vh * taken[..., None], "k": k}
    return replace(found, **kept, residual=found.residual[..., :r] * taken), level


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


def _equal(W: Tensor, smoothing: Smoothing) -> Correction:
    r"""All singular values equal at constant Frobenius norm, the MSign rule (arXiv 2602.01734).

    With the edge ``init`` the Frobenius norm comes down to that of a fresh matrix, ``sqrt(m n) std``, where it is
    above: the directions stay, and what a deadly learning rate did to shape and scale is undone.

    Args:
        W: matrices ``(..., m, n)``.
        smoothing: its edge.

    Returns:
        The correction, of full rank.
    """
    found = dominant_directions(W, rank=min(W.shape[-2:]))
    nonzero = found.S > torch.finfo(found.S.dtype).eps * max(W.shape[-2:]) * found.S[..., :1]
    count = nonzero.sum(dim=-1, keepdim=True).clamp_min(1)
    level = torch.linalg.vector_norm(found.S.double(), dim=-1, keepdim=True)  # squares would leave float32
    level = (level / count.sqrt()).to(found.S.dtype)
    if smoothing.edge == "init":
        m, n = W.shape[-2:]
        fresh = smoothing.level(m, n) * math.sqrt(m * n) / (math.sqrt(m) + math.sqrt(n))
        level = torch.minimum(level, fresh / count.to(level.dtype).sqrt())
    return _from_triplets(found, level[..., 0], torch.where(nonzero, found.S - level, torch.zeros_like(found.S)))


def scaled(W: Tensor, most: float) -> Correction:
    r"""All singular values by one factor, ``min(1, most / ||W||_F)``.

    Args:
        W: a matrix ``(m, n)``.
        most: the Frobenius norm that it may have.

    Returns:
        The correction, as one factor of ``W`` itself; without any where ``W`` is smaller, but for rounding.

    Example:
        >>> W = torch.diag(torch.tensor([6.0, 8.0]))
        >>> scaled(W, most=5.0).apply(W).diag().tolist()
        [3.0, 4.0]
    """
    W = checked_matrices(W)
    found = dominant_directions(W, rank=0)
    norm = float(found.spectral_norm) * math.sqrt(float(found.stable_rank))
    fall = 1 - most / norm if norm > most * (1 + _SAME) else 0.0
    identity = torch.eye(W.shape[-1], dtype=W.dtype, device=W.device)
    whole = replace(found, U=W, S=W.new_ones(W.shape[-1]), Vh=identity, residual=W.new_zeros(W.shape[-1]))
    return _from_triplets(whole, found.spectral_norm * (1 - fall), fall * whole.S)


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
