# SPDX-License-Identifier: Apache-2.0
r"""Edges of a smoothing: the level that dominant singular values come down to.

Each is a pure function of the matrices that gives one level a matrix; a callable of the same form stands in for a
name in :class:`pss_param.smoothing.Smoothing`. The formulas other than ``dominant`` are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pss_param.spectrum import dominant_directions, spectral_norm

EdgeFunction = Callable[[Tensor], Tensor]

EDGES = ("dominant", "mild", "bulk", "init", "reference")
"""The names. ``reference`` is the spectral norm of the same weight in a healthy checkpoint: :func:`spectral_norm`."""

LIVE_EDGES = (*EDGES, "baseline")
"""The names in a live run. ``baseline`` is the spectral norm that the weight had while it was healthy, a slow average
that a detector keeps: :class:`pss_param.StableRankFloor`."""


def dominant(W: Tensor, rank: int | None = None) -> Tensor:
    r"""The published edge: the first value behind the dominant ones.

    .. math:: c = S_k, \qquad k = \lfloor \mathrm{SR}(W) \rfloor

    Args:
        W: matrices ``(..., m, n)``, any floating dtype.
        rank: another ``k``.

    Returns:
        Levels ``(...)``, in the units of ``W``.

    Example:
        >>> round(float(dominant(torch.diag(torch.tensor([4.0, 2.0, 1.0])))), 4)
        2.0

    References:
        Parametric Singularity Smoothing, arXiv 2602.01308.
    """
    return dominant_directions(W, rank).edge


def mild(W: Tensor, std: float | None = None) -> Tensor:
    r"""The published edge, where it is above the spectral norm of a fresh matrix; that norm elsewhere.

    .. math:: c = \max\bigl(S_k, (\sqrt m + \sqrt n)\,\mathrm{std}\bigr), \qquad k = \lfloor \mathrm{SR}(W) \rfloor

    A healthy matrix has a large stable rank, so the published edge lies deep in its bulk: a quarter of the values of a
    square one lie above. This edge takes nothing from it, and a trigger that was none does no harm.

    Args:
        W: matrices ``(..., m, n)``, any floating dtype.
        std: standard deviation of a fresh entry; ``None`` means PyTorch's ``Linear``, ``1 / sqrt(3 n)``.

    Returns:
        Levels ``(...)``, in the units of ``W``.

    Example:
        >>> W = torch.diag(torch.tensor([9.0, 2.0, 1.0]))
        >>> round(float(mild(W, std=0.1)), 4), round(float(mild(W, std=1.0)), 4)
        (2.0, 3.4641)

    References:
        Ours; the two levels are those of :func:`dominant` and :func:`init`.
    """
    return torch.maximum(dominant(W), init(W, std))


def bulk(W: Tensor) -> Tensor:
    r"""Marchenko-Pastur edge of the matrix's own bulk.

    .. math:: c = (\sqrt m + \sqrt n) \cdot \mathrm{rms}(S \text{ clipped at } c), \qquad
        \mathrm{rms} = \|\cdot\|_F / \sqrt{mn}

    The largest fixed point: the largest singular value that a matrix of independent entries would have, if its energy
    were that of ``W`` without what stands out of it.

    Args:
        W: matrices ``(..., m, n)``, any floating dtype.

    Returns:
        Levels ``(...)``, in the units of ``W``; 0 where there is no bulk.

    Example:
        >>> round(float(bulk(torch.eye(4))), 4)
        2.0

    References:
        Marchenko and Pastur, Math. USSR-Sbornik 1 (1967); the fixed point is ours.
    """
    return dominant_directions(W, above="bulk").bulk_edge


def init(W: Tensor, std: float | None = None) -> Tensor:
    r"""Spectral norm of a fresh matrix of this shape, :math:`(\sqrt m + \sqrt n)\,\mathrm{std}`.

    Args:
        W: matrices ``(..., m, n)``; only their shape counts.
        std: standard deviation of a fresh entry; ``None`` means PyTorch's ``Linear``, ``1 / sqrt(3 n)``.

    Returns:
        Levels ``(...)``, float32.

    Example:
        >>> round(float(init(torch.zeros(100, 300), std=0.02)), 4)
        0.5464

    References:
        Davidson and Szarek, "Local operator theory, random matrices and Banach spaces" (2001), theorem II.13.
    """
    m, n = W.shape[-2:]
    return torch.full(W.shape[:-2], init_level(m, n, std), device=W.device)


def init_level(m: int, n: int, std: float | None) -> float:
    """The same as a number.

    Args:
        m: rows.
        n: columns, the fan-in.
        std: standard deviation of a fresh entry; ``None`` means ``1 / sqrt(3 n)``.

    Returns:
        The level.
    """
    return (math.sqrt(m) + math.sqrt(n)) * (std if std is not None else fresh_std(n))


def fresh_std(n: int) -> float:
    """What PyTorch's ``Linear`` draws with.

    Args:
        n: columns, the fan-in.

    Returns:
        The standard deviation of an entry.
    """
    return 1 / math.sqrt(3 * n)


def reference(healthy: Tensor) -> EdgeFunction:
    """An edge function that brings a weight down to the spectral norm it had when it was healthy.

    Args:
        healthy: the same weight in a healthy checkpoint, ``(..., m, n)``.

    Returns:
        The edge function.

    Example:
        >>> float(reference(torch.diag(torch.tensor([3.0, 1.0])))(torch.zeros(2, 2)).round(decimals=4))
        3.0
    """
    level = spectral_norm(healthy)
    return lambda W: level.to(W.device)
