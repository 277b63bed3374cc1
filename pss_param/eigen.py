# SPDX-License-Identifier: Apache-2.0
r"""Eigenvalues of many small symmetric matrices at once, in float64.

# Note [Many small eigenproblems]
A GPU library solves a batch of matrices of up to 32 columns in one kernel and larger ones after each other: on an H100
32 problems of 32 columns take 0.3 ms, and each of 96 columns 1.3 ms, of 192 1.5, of 256 2.1. A core of a CPU takes 0.9,
3.2 and 6.3 ms for those, the way there and back 1 ms more, and there are many cores. So where there are several to each
32 of their columns, the threads of the host solve them, one each: 28 matrices of 64, 96, 192 and 256 columns took 2.8,
4.0, 16 and 36 ms there, and 21, 35, 42 and 58 on the GPU; 4 of 96 columns 2.4 against 5.1, 2 of 192 7.6 against 3.1.
Larger ones stay where they are (12 of 384 columns: 41 ms either way), and so do those of more than 128 columns where
fewer than four threads are given.

Each thread works alone, since a library that spreads one small problem over many threads, in many threads at once,
takes four times as long.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier, Lock

import torch
from torch import Tensor

from pss_param.products import on_gpu

__all__ = ["bound_by_powers", "eigh", "eigvalsh", "high_power", "largest", "largest_and_trace"]

_IN_ONE_KERNEL = 32
_ON_FEW, _ON_HOST = 128, 256  # columns up to which few threads of the host, and more, take less time
_FEW = 4
_MOST_THREADS = 8  # sixteen were no faster
_PATIENCE = 60.0  # seconds until a thread that does not start is an error
_STARTING = Lock()
_SQUARINGS = 8


def eigh(A: Tensor) -> tuple[Tensor, Tensor]:
    r"""Eigenvalues and eigenvectors, as :func:`torch.linalg.eigh` gives them.

    Args:
        A: symmetric, float64 ``(..., f, f)``.

    Returns:
        Ascending values ``(..., f)`` and the vectors as columns.
    """
    if not _on_host(A):
        values, vectors = torch.linalg.eigh(A)
        return values, vectors
    found = _threads().map(torch.linalg.eigh, A.reshape(-1, *A.shape[-2:]).cpu())
    values, vectors = (torch.stack(parts).to(A.device) for parts in zip(*found, strict=True))
    return values.reshape(A.shape[:-1]), vectors.reshape(A.shape)


def eigvalsh(A: Tensor) -> Tensor:
    r"""Eigenvalues alone.

    Args:
        A: symmetric, float64 ``(..., f, f)``.

    Returns:
        Ascending values ``(..., f)``.
    """
    if not _on_host(A):
        values: Tensor = torch.linalg.eigvalsh(A)
        return values
    found = _threads().map(torch.linalg.eigvalsh, A.reshape(-1, *A.shape[-2:]).cpu())
    return torch.stack([*found]).to(A.device).reshape(A.shape[:-1])


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


def _on_host(A: Tensor) -> bool:
    columns, most = A.shape[-1], _ON_HOST if torch.get_num_threads() >= _FEW else _ON_FEW
    several = A.shape[:-2].numel() * _IN_ONE_KERNEL > columns
    return on_gpu(A) and several and _IN_ONE_KERNEL < columns <= most


def _threads() -> ThreadPoolExecutor:
    with _STARTING:
        return _started()


@cache
def _started() -> ThreadPoolExecutor:
    """Eight, or as many as torch was given, each for one matrix at a time."""
    given = torch.get_num_threads()
    count = min(given, _MOST_THREADS)
    pool, together = ThreadPoolExecutor(count, "pss_param"), Barrier(count, timeout=_PATIENCE)

    def alone(_: int) -> None:
        torch.get_num_threads()  # a thread takes on what was said to others when it is first asked, not later
        torch.set_num_threads(1)
        together.wait()

    list(pool.map(alone, range(count)))
    torch.set_num_threads(given)  # what one thread says is also said to those that are yet to begin
    return pool
