# SPDX-License-Identifier: Apache-2.0
r"""Eigenvalues of many small symmetric matrices at once, in float64.

# Note [Many small eigenproblems]
A GPU library solves a batch of matrices of up to 32 columns in one kernel and larger ones after each other: on an H100
32 problems of 32 columns take 0.3 ms, and 32 of 64 columns 24 ms, more than everything else that a batch of dominant
directions takes. So larger ones are solved there by a block Jacobi method, for which problems of 32 columns are all
that it needs: the columns in blocks of 16, a round robin of all pairs of blocks, each pair diagonalised, until nothing
is left outside of the diagonal. The number of kernels does not depend on the number of matrices.

A CPU takes them one after the other, by ``torch.linalg``. For few of up to 128 columns that takes less time than a
GPU needs, 2 to 4 ms for each, even though they have to be brought there and back.

References:
    Golub and Van Loan, "Matrix Computations", 8.5.6 (block Jacobi procedures).
"""

from __future__ import annotations

import math
from functools import cache

import torch
from einops import rearrange
from torch import Tensor

from pss_param.products import on_gpu

__all__ = ["block_jacobi", "bound_by_powers", "eigh", "eigvalsh", "high_power", "largest", "largest_and_trace"]

_IN_ONE_KERNEL = 32
_MANY = 16  # matrices from which the rounds of the block method take less time than as many calls
_ON_HOST = 128  # columns up to which few matrices are brought to the CPU
_BLOCK = 16
_SWEEPS = 12
_ENOUGH = 1e-12  # outside of the diagonal, over the whole; what is left moves values that lie apart by its square
_SQUARINGS = 8


def eigh(A: Tensor) -> tuple[Tensor, Tensor]:
    r"""Eigenvalues and eigenvectors, as :func:`torch.linalg.eigh` gives them.

    Args:
        A: positive semidefinite, float64 ``(..., f, f)``.

    Returns:
        Ascending values ``(..., f)`` and the vectors as columns.
    """
    found = block_jacobi(A) if _in_rounds(A) else None
    if found is None:
        values, vectors = torch.linalg.eigh(A.cpu() if _on_host(A) else A)
        return values.to(A.device), vectors.to(A.device)
    return found


def eigvalsh(A: Tensor) -> Tensor:
    r"""Eigenvalues alone.

    Args:
        A: positive semidefinite, float64 ``(..., f, f)``.

    Returns:
        Ascending values ``(..., f)``.
    """
    if _in_rounds(A):
        return eigh(A)[0]
    values: Tensor = torch.linalg.eigvalsh(A.cpu() if _on_host(A) else A)
    return values.to(A.device)


def largest(A: Tensor) -> Tensor:
    r"""The largest eigenvalue; on a GPU a bound that is at most 1 % above it.

    .. math:: \lambda_0 \le \|A^p\|_F^{1/p} \le f^{1/2p} \lambda_0, \qquad p = 2^8

    Args:
        A: positive semidefinite, float64 ``(..., f, f)``.

    Returns:
        ``(...)``.

    Example:
        >>> float(largest(torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))))
        3.0
    """
    return bound_by_powers(A) if on_gpu(A) else torch.linalg.eigvalsh(A)[..., -1]


def largest_and_trace(A: Tensor) -> list[tuple[float, float]]:
    r"""The largest eigenvalue of each matrix, as :func:`largest` gives it, and the sum of all: one synchronisation.

    Args:
        A: positive semidefinite, float64 ``(..., f, f)``.

    Returns:
        Two numbers a matrix.

    Example:
        >>> largest_and_trace(torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64)))
        [(3.0, 4.0)]
    """
    A = A.reshape(-1, *A.shape[-2:])
    if not on_gpu(A):
        return [(line[-1], sum(line)) for line in torch.linalg.eigvalsh(A).tolist()]
    tops, traces = torch.stack([bound_by_powers(A), A.diagonal(dim1=-2, dim2=-1).sum(-1)]).tolist()
    return list(zip(tops, traces, strict=True))


def bound_by_powers(A: Tensor) -> Tensor:
    r"""The bound of :func:`largest`.

    Args:
        A: positive semidefinite, float64 ``(..., f, f)``.

    Returns:
        ``(...)``.

    Example:
        >>> round(float(bound_by_powers(torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64)))), 4)
        3.0
    """
    bound: Tensor = (high_power(A)[1] / 2**_SQUARINGS).exp()
    return bound


def high_power(A: Tensor) -> tuple[Tensor, Tensor]:
    r"""The power :math:`A^{256}`, whose columns are the top eigenvector wherever that stands alone.

    Args:
        A: symmetric, float64 ``(..., f, f)``.

    Returns:
        The power over its Frobenius norm, and the logarithm of that norm ``(...)``.

    Example:
        >>> power, log = high_power(2 * torch.eye(1, dtype=torch.float64))
        >>> float(power), round(float(log) / 256, 4)
        (1.0, 0.6931)
    """
    tiny = torch.finfo(A.dtype).tiny
    size = torch.linalg.matrix_norm(A).clamp_min(tiny)
    power, log = A / size[..., None, None], size.log()
    for _ in range(_SQUARINGS):
        power = power @ power
        size = torch.linalg.matrix_norm(power).clamp_min(tiny)
        power, log = power / size[..., None, None], 2 * log + size.log()
    return power, log


def _in_rounds(A: Tensor) -> bool:
    return on_gpu(A) and A.dim() > 2 and A.shape[-1] > _IN_ONE_KERNEL and math.prod(A.shape[:-2]) >= _MANY


def _on_host(A: Tensor) -> bool:
    return on_gpu(A) and _IN_ONE_KERNEL < A.shape[-1] <= _ON_HOST


def block_jacobi(A: Tensor) -> tuple[Tensor, Tensor] | None:
    r"""Eigenvalues and eigenvectors by Note [Many small eigenproblems].

    Args:
        A: positive semidefinite, float64 ``(B, f, f)``.

    Returns:
        Ascending values ``(B, f)`` and the vectors as columns; ``None`` where the rounds do not come to rest.

    Example:
        >>> A = torch.diag(torch.arange(40, dtype=torch.float64)).expand(2, 40, 40)
        >>> values, vectors = block_jacobi(A)
        >>> bool(torch.allclose(values[1], torch.arange(40, dtype=torch.float64)))
        True
    """
    f = A.shape[-1]
    A, V = _padded(A)
    enough = _ENOUGH * torch.linalg.matrix_norm(A)
    blocks = list(range(A.shape[-1] // _BLOCK))
    for _ in range(_SWEEPS):
        for _ in range(len(blocks) - 1):
            A, V = _round(A, V, *_orders(tuple(blocks), A.device))
            blocks = [blocks[0], blocks[-1], *blocks[1:-1]]
        values = A.diagonal(dim1=-2, dim2=-1)
        if bool((torch.linalg.matrix_norm(A - torch.diag_embed(values)) <= enough).all()):
            return _sorted(values, V, f)
    return None


def _padded(A: Tensor) -> tuple[Tensor, Tensor]:
    """An even number of blocks; what is added has values below all others, and stays apart."""
    f, width = A.shape[-1], 2 * _BLOCK * math.ceil(A.shape[-1] / (2 * _BLOCK))
    identity = torch.eye(width, dtype=A.dtype, device=A.device)
    if width > f:
        whole = A.new_zeros(*A.shape[:-2], width, width)
        whole[..., :f, :f] = A
        size = torch.linalg.matrix_norm(A)
        whole[..., f:, f:] = -identity[f:, f:] * size.masked_fill(size == 0, 1.0)[..., None, None]
        A = whole
    return A, identity.expand_as(A)


@cache
def _orders(blocks: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Give columns in the order in which paired blocks stand side by side, and the way back.

    The first block meets the last, and so on. Of each pair the one that stands before the other in the matrix comes
    first, so that all pairs sort alike: were the small values to go into another block of the two each time, the rounds
    would never come to rest.

    Args:
        blocks: numbers of the blocks, an even count.
        device: where the columns are.

    Returns:
        Two index tensors.
    """
    half = len(blocks) // 2
    pairs = [block for pair in zip(blocks[:half], reversed(blocks[half:]), strict=True) for block in sorted(pair)]
    order = (torch.tensor(pairs)[:, None] * _BLOCK + torch.arange(_BLOCK)).flatten()
    return order.to(device), torch.argsort(order).to(device)


def _round(A: Tensor, V: Tensor, order: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
    """Diagonalise every pair; rows and columns of the result are where they were."""
    B, wide = A.shape[0], 2 * _BLOCK
    A, V = A[:, order][:, :, order], V[:, :, order]
    tiles = rearrange(A, "b (p i) (q j) -> b i j p q", i=wide, j=wide).diagonal(dim1=-2, dim2=-1)
    Q = torch.linalg.eigh(rearrange(tiles, "b i j p -> (b p) i j")).eigenvectors
    Q = rearrange(Q, "(b p) i j -> b p i j", b=B)
    A = _from_the_left(Q, _from_the_left(Q, A).mT)  # Q^T (Q^T A)^T: A is symmetric
    V = _from_the_left(Q, V.mT).mT
    return A[:, back][:, :, back], V[:, :, back]


def _from_the_left(Q: Tensor, A: Tensor) -> Tensor:
    """``Q^T A`` of a block-diagonal ``Q (B, pairs, 32, 32)``."""
    return rearrange(Q.mT @ rearrange(A, "b (p i) n -> b p i n", i=Q.shape[-1]), "b p i n -> b (p i) n")


def _sorted(values: Tensor, V: Tensor, f: int) -> tuple[Tensor, Tensor]:
    order = values.argsort(dim=-1)[:, -f:]
    vectors = V.gather(-1, order[:, None, :].expand(-1, V.shape[-2], -1))
    return values.gather(-1, order), vectors[:, :f]
