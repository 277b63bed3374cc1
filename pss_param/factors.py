# SPDX-License-Identifier: Apache-2.0
r"""The thin factors of what an open gate takes away from a weight."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pss_param.lowrank import Correction
from pss_param.smoothing import Smoothing, correction, corrections

__all__ = ["Factors", "factors_at", "factors_of", "factors_together", "no_change", "padded"]


class Factors(NamedTuple):
    r"""The part that smoothing takes away from one batch of matrices: ``left @ right``.

    Attributes:
        left: Left dominant directions times what their values lose, ``(..., m, r)``, float32 or wider.
        right: Right dominant directions, ``(..., r, n)``.
    """

    left: Tensor
    right: Tensor


def factors_of(
    parts: Sequence[Tensor], smoothing: Smoothing, generator: torch.Generator, levels: Sequence[Tensor] = ()
) -> tuple[Factors, ...]:
    r"""Compute what a smoothing takes away from each of the matrices that one weight acts as.

    Args:
        parts: The matrices ``(..., m, n)``.
        smoothing: What is taken away.
        generator: Source of the random sketch.
        levels: Of each part, the levels ``(...)`` of the ``baseline`` edge.

    Returns:
        A pair for each part.

    Example:
        >>> (pair,) = factors_of([torch.diag(torch.tensor([6.0, 2.0, 2.0]))], Smoothing(rank=1), torch.Generator())
        >>> round(float((pair.left @ pair.right)[0, 0]), 4)
        4.0
    """
    if len(parts) > 1 and all(part.shape == parts[0].shape for part in parts):
        # What surrounds the linear algebra is paid once for all of them.
        leveled = _at(smoothing, torch.stack(tuple(levels))) if levels else smoothing
        one = correction(torch.stack(tuple(parts)), leveled, generator=generator)
        return tuple(map(Factors, (one.U * one.d.unsqueeze(-2)).unbind(), one.Vh.unbind()))
    each = [_at(smoothing, level) for level in levels] or [smoothing] * len(parts)
    found = [correction(part, its, generator=generator) for part, its in zip(parts, each, strict=True)]
    return tuple(Factors(one.U * one.d.unsqueeze(-2), one.Vh) for one in found)


def factors_together(
    parts: Sequence[Tensor], smoothing: Smoothing, generator: torch.Generator, levels: Sequence[Tensor]
) -> tuple[Factors, ...]:
    r"""What :func:`factors_of` computes, of matrices of any shapes that need not belong to one weight.

    Args:
        parts: The matrices ``(..., m, n)``, all on one device and of one dtype.
        smoothing: What is taken away.
        generator: Source of the random sketch, which all share.
        levels: Of each part, the levels ``(...)`` of the ``baseline`` edge.

    Returns:
        A pair for each part, as thin as the part allows.

    Example:
        >>> parts = [torch.diag(torch.tensor([6.0, 2.0, 2.0])), torch.eye(3), torch.ones(2, 3)]
        >>> pairs = factors_together(parts, Smoothing(rank=1), torch.Generator(), [])
        >>> round(float((pairs[0].left @ pairs[0].right)[0, 0]), 4)
        4.0
    """
    shapes: dict[torch.Size, list[int]] = {}
    for i, part in enumerate(parts):
        shapes.setdefault(part.shape, []).append(i)
    pairs = [
        (
            torch.stack([parts[i] for i in places]),
            _at(smoothing, torch.stack([levels[i] for i in places])) if levels else smoothing,
        )
        for places in shapes.values()
    ]
    found = dict[int, Factors]()
    for places, one in zip(shapes.values(), corrections(pairs, generator), strict=True):
        found |= zip(places, _thin(one), strict=True)
    return tuple(found[i] for i in range(len(parts)))


def _thin(one: Correction) -> list[Factors]:
    left, ranks = one.U * one.d.unsqueeze(-2), one.k.flatten(1).amax(1) if one.k.dim() > 1 else one.k
    return [
        Factors(left[i, ..., :rank].contiguous(), one.Vh[i, ..., :rank, :].contiguous())
        for i, rank in enumerate(ranks.tolist())
    ]


def _at(smoothing: Smoothing, level: Tensor) -> Smoothing:
    return replace(smoothing, edge=lambda W: level) if smoothing.edge == "baseline" else smoothing


def factors_at(weight: Tensor, pair: Factors) -> Factors:
    r"""Bring factors to where a weight has been moved.

    Args:
        weight: The weight.
        pair: Its factors.

    Returns:
        The same factors on the weight's device.
    """
    return Factors(pair.left.to(weight.device), pair.right.to(weight.device))


def padded(pair: Factors, rank: int) -> Factors:
    r"""Give factors a fixed rank by adding zeros.

    Args:
        pair: The factors.
        rank: The new rank; factors that have more keep it.

    Returns:
        Factors of the same product.
    """
    missing = max(0, rank - pair.right.shape[-2])
    # Contiguous, because compiled programs are bound to strides too.
    left = nn.functional.pad(pair.left, (0, missing)).contiguous()
    return Factors(left, nn.functional.pad(pair.right, (0, 0, 0, missing)).contiguous())


def no_change(part: Tensor, rank: int, device: torch.device) -> Factors:
    r"""Make factors of zeros.

    Args:
        part: A matrix ``(..., m, n)`` of the shape and dtype to fit.
        rank: Their rank.
        device: Where they shall lie.

    Returns:
        Factors whose product takes nothing away.

    Example:
        >>> [tuple(factor.shape) for factor in no_change(torch.ones(4, 3), 2, torch.device("cpu"))]
        [(4, 2), (2, 3)]
    """
    *batch, m, n = part.shape
    dtype = torch.promote_types(part.dtype, torch.float32)
    shapes = (*batch, m, rank), (*batch, rank, n)
    return Factors(*(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes))
