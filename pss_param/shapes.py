# SPDX-License-Identifier: Apache-2.0
r"""Shapes of a smoothing: how dominant singular values come down to the edge.

Each is a pure function ``f(S, edge)`` of the dominant values of one matrix, ``(k,)`` in descending order, and the
level that they come down to. All are scale-equivariant, keep order and never raise the largest value; users pass
their own in the same form.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

ShapeFunction = Callable[[Tensor, Tensor], Tensor]


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
