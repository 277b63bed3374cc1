# SPDX-License-Identifier: Apache-2.0
r"""A cheap look at the stable rank, for watching a weight during training; nothing here is certified."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pss_param.sharded import ShardedMatrix, is_sharded

_SEED = 0x50555


class StableRankEstimate(NamedTuple):
    """What :func:`stable_rank_estimate` saw.

    Attributes:
        stable_rank: the estimate, ``(...)``; never below the stable rank but for rounding.
        vector: where the next estimate goes on, on ``W.mT``: unit vectors ``(..., m, 1)``.
    """

    stable_rank: Tensor
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
    wide = torch.promote_types(W.dtype, torch.float32)
    if init is None:
        init = torch.randn(W.shape[-1], 1, generator=torch.Generator().manual_seed(_SEED), device="cpu")
        init = (init / torch.linalg.vector_norm(init)).expand(*W.shape[:-2], -1, -1)
    image = (W @ init.to(W.device, W.dtype)).to(wide)
    length = torch.linalg.vector_norm(image, dim=-2, keepdim=True)
    # A vector of zeros or NaN would stay one for ever, so it is replaced; this look then measures nothing.
    fixed = torch.linspace(1, 2, image.shape[-2], dtype=wide, device=image.device)[:, None]
    usable = torch.isfinite(length) & (length > 0)
    vector = torch.where(usable, image / length, fixed / torch.linalg.vector_norm(fixed))
    whole = W.frobenius_norm() if isinstance(W, ShardedMatrix) else _plain_norm(W, wide)
    return StableRankEstimate((whole / length[..., 0, 0]).square(), vector)


def _plain_norm(W: Tensor, wide: torch.dtype) -> Tensor:
    rows = torch.linalg.vector_norm(W, dim=-1, dtype=wide)  # by rows it vectorises: three times as fast on a CPU
    norm: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return norm
