# SPDX-License-Identifier: Apache-2.0
r"""A cheap look at the stable rank, for watching a weight during training; nothing here is certified."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pss_param.sharded import ShardedMatrix, is_sharded

_SEED = 0x50555
_WIDE = (torch.float32, torch.float64)


class StableRankEstimate(NamedTuple):
    """What :func:`stable_rank_estimate` saw.

    Attributes:
        stable_rank: the estimate, ``(...)``; never below the stable rank but for rounding.
        vector: where the next estimate goes on, on ``W.mT``: unit vectors ``(..., m, 1)``.
    """

    stable_rank: Tensor
    vector: Tensor


class StableRankEstimates(NamedTuple):
    """What :func:`stable_rank_estimates` saw.

    Attributes:
        stable_ranks: the estimates of all matrices one after the other, flat.
        spectral_norms: what the largest singular values are at least, likewise.
        vectors: of each matrix, as in :class:`StableRankEstimate`.
    """

    stable_ranks: Tensor
    spectral_norms: Tensor
    vectors: list[Tensor]


class _Look(NamedTuple):
    """One half iteration."""

    stable_rank: Tensor
    spectral_norm: Tensor
    vector: Tensor


@torch.no_grad()
def stable_rank_estimate(W: Tensor | ShardedMatrix, init: Tensor | None = None) -> StableRankEstimate:
    r"""A stable rank for watching: two readings of the weight, no host synchronisation.

    .. math:: \widehat{\mathrm{SR}} = \|W\|_F^2 \,/\, \|W x\|^2 \;\ge\; \mathrm{SR}(W), \qquad \|x\| = 1

    Half an iteration of the power method, and the norm. The estimate is an upper bound, since no unit vector ``x``
    stretches by more than the largest singular value; it is sharp once ``x`` has turned to the top. ``W x / ||W x||``
    is the start of the next half iteration, on the transpose, whose stable rank is the same: alternate ``W`` and
    ``W.mT``. Over a training run weights move little between two looks, and the vector stays converged; from a fresh
    vector make some looks first.

    Args:
        W: matrices ``(..., m, n)`` of a floating dtype, or the linear map of a sharded one.
        init: ``vector`` of the look before, ``(..., n, 1)``; ``None`` starts from fixed random numbers.

    Shape:
        ``(..., m, n)`` to ``(...)``, dimensionless, and ``(..., m, 1)``; float32 or wider. Products of a bfloat16
        weight are bfloat16's.

    Returns:
        The estimate and the vector. A weight of zeros, NaN or infinities has a stable rank that is not finite (or 0),
        and a fixed vector that is.

    Example:
        >>> W, x = torch.diag(torch.tensor([3.0, 1.0, 1.0])), None
        >>> for step in range(8):
        ...     estimate, x = stable_rank_estimate(W if step % 2 == 0 else W.mT, x)
        >>> round(float(estimate), 4)
        1.2222

    References:
        Golub and Van Loan, "Matrix Computations", 8.2.
    """
    if is_sharded(W):
        W = ShardedMatrix(W)
    if init is None:
        init = torch.randn(W.shape[-1], 1, generator=torch.Generator().manual_seed(_SEED), device="cpu")
        init = (init / torch.linalg.vector_norm(init)).expand(*W.shape[:-2], -1, -1)
    seen = _alone(W, init)
    return StableRankEstimate(seen.stable_rank, seen.vector)


@torch.no_grad()
def stable_rank_estimates(matrices: Sequence[Tensor | ShardedMatrix], starts: Sequence[Tensor]) -> StableRankEstimates:
    r"""What :func:`stable_rank_estimate` sees of each of many matrices, in fewer kernels and without copying any.

    Args:
        matrices: each as there; those of one shape need not lie together.
        starts: one start for each.

    Returns:
        All estimates in one row, and the vectors in the order of the matrices.

    Example:
        >>> stable_rank_estimates([torch.eye(4), torch.eye(1)], [torch.ones(4, 1) / 2, torch.ones(1, 1)]).stable_ranks
        tensor([4., 1.])
    """
    looks: dict[int, _Look] = {}
    for members in _groups(matrices):
        if len(members) == 1:
            (i,) = members
            looks[i] = _alone(matrices[i], starts[i])
            continue
        seen = _together([matrices[i] for i in members], [starts[i] for i in members])  # type: ignore[misc]
        each = zip(*(part.unbind() for part in seen), strict=True)
        looks.update(zip(members, itertools.starmap(_Look, each), strict=True))
    ranks, norms, vectors = (list(part) for part in zip(*(looks[i] for i in range(len(looks))), strict=True))
    return StableRankEstimates(_in_a_row(ranks), _in_a_row(norms), vectors)


def _alone(W: Tensor | ShardedMatrix, start: Tensor) -> _Look:
    image = _image(W, start)
    whole = W.frobenius_norm() if isinstance(W, ShardedMatrix) else _plain_norm(W, image.dtype)
    length, vector = _normalised(image)
    return _Look((whole / length).square(), length, vector)


def _in_a_row(ranks: list[Tensor]) -> Tensor:
    device = ranks[0].device
    if all(rank.dim() == 0 and rank.device == device for rank in ranks):
        return torch.stack(ranks)
    return torch.cat([rank.reshape(-1).to(device) for rank in ranks])


def _groups(matrices: Sequence[Tensor | ShardedMatrix]) -> list[list[int]]:
    """Plain matrices with equally many rows go together: their images have one shape."""
    groups: dict[object, list[int]] = {}
    for i, matrix in enumerate(matrices):
        alone = isinstance(matrix, ShardedMatrix) or matrix.dim() != 2
        groups.setdefault(i if alone else (matrix.shape[0], matrix.dtype, matrix.device), []).append(i)
    return list(groups.values())


def _together(matrices: list[Tensor], starts: list[Tensor]) -> _Look:
    length, vector = _normalised(torch.stack([_image(*pair) for pair in zip(matrices, starts, strict=True)]))
    whole = torch.stack(torch._foreach_norm(matrices, 2, vector.dtype))
    return _Look((whole / length).square(), length, vector)


def _image(W: Tensor | ShardedMatrix, start: Tensor) -> Tensor:
    dtype, device = W.dtype, W.device
    # After a training step every call that does nothing costs as much as a product of a small matrix.
    if start.dtype != dtype or start.device != device:
        start = start.to(device, dtype)
    if torch.is_autocast_enabled(device.type):  # a step may be taken inside of it; the product would be bfloat16's
        with torch.autocast(device.type, enabled=False):
            return _image(W, start)
    image: Tensor = W @ start
    return image if dtype in _WIDE else image.to(torch.float32)


def _normalised(image: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths ``(...)`` of images ``(..., m, 1)``, and unit vectors."""
    length = torch.linalg.vector_norm(image, dim=-2, keepdim=True)
    # A vector of zeros or NaN would stay one for ever, so it is replaced; this look then measures nothing.
    fixed = torch.linspace(1, 2, image.shape[-2], dtype=image.dtype, device=image.device)[:, None]
    usable = torch.isfinite(length) & (length > 0)
    vector = torch.where(usable, image / length, fixed / torch.linalg.vector_norm(fixed))
    return length[..., 0, 0], vector


def _plain_norm(W: Tensor, wide: torch.dtype) -> Tensor:
    if W.dim() == 2:
        # In the order of memory, whichever side is looked at: along the columns of a transpose it is 20 times slower.
        return torch._foreach_norm([W], 2, wide)[0]
    norm: Tensor = torch.linalg.vector_norm(W, dim=(-2, -1), dtype=wide)
    return norm
