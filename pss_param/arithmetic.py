# SPDX-License-Identifier: Apache-2.0
r"""What numpy and torch call differently, for small matrices in float64.

# Note [Where small matrices are]
An operation on a matrix of 32 columns takes less time than calling for it: numpy is called three to ten times as fast
as torch. So on a CPU, and for a single matrix of a GPU, where a library takes milliseconds for one small eigenproblem,
the small matrices are numpy's arrays. Those of a batch on a GPU stay there and share every kernel. The lines of
:mod:`pss_param.core` are the same for both; :class:`Arithmetic` holds what is called differently. What is LAPACK's, or
large, is torch's in both: numpy's own threads would wait for torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pss_param import eigen
from pss_param.blocks import identity

__all__ = ["DEVICE", "HOST", "Arithmetic", "Array"]

Array = Any
"""A numpy array or a tensor."""

_ALONE = 1 << 17  # multiplications up to which numpy calls no threads


@dataclass(frozen=True)
class Arithmetic:
    """What numpy and torch call differently.

    Attributes:
        at_hand: whether a look at a number waits for nothing.
        taken: what was made on the device, ``(..., h, b)``, as arrays ``(B, h, b)``.
        given: an array as a tensor, on the host for numpy's.
        numbers: three arrays ``(B, f), (B, f), (B,)`` as lists.
        empty: an array of that shape beside another one.
        array: numbers in the type of an array.
        both: two arrays of one number as numbers.
        descending: so many of the last columns, the last one first.
        where: one array where a condition holds, another or a number elsewhere.
        at_least: the larger of an array and a number.
        at_most: the smaller of two arrays.
        product: of two matrices.
        cholesky: ``L``, and whether there is one, ``(B,)``.
        inverse: of ``L``.
        solved: ``L^-T`` times an array.
        eigh: ascending eigenvalues, and the vectors as columns.
        eigvalsh: ascending eigenvalues.
        largest: the largest eigenvalue, or a bound hardly above it.
    """

    at_hand: bool
    taken: Callable[[Tensor], Array]
    given: Callable[[Array], Tensor]
    numbers: Callable[[Array, Array, Array], list[Any]]
    empty: Callable[[tuple[int, ...], Array], Array]
    array: Callable[[list[Any], Array], Array]
    both: Callable[[Array, Array], list[float]]
    descending: Callable[[Array, int], Array]
    where: Callable[[Array, Array, Any], Array]
    at_least: Callable[[Array, float], Array]
    at_most: Callable[[Array, Array], Array]
    product: Callable[[Array, Array], Array]
    cholesky: Callable[[Array], tuple[Array, Array]]
    inverse: Callable[[Array], Array]
    solved: Callable[[Array, Array], Array]
    eigh: Callable[[Array], tuple[Array, Array]]
    eigvalsh: Callable[[Array], Array]
    largest: Callable[[Array], Array]


def _on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operation of torch's LAPACK on arrays of numpy's."""

    def call(*arrays: Array) -> Any:
        found = function(*map(torch.from_numpy, arrays))
        return found.numpy() if isinstance(found, Tensor) else tuple(part.numpy() for part in found)

    return call


def _cholesky(A: Tensor) -> tuple[Tensor, Tensor]:
    """The factor, and whether there is one."""
    L, info = torch.linalg.cholesky_ex(A)
    return L, info == 0


def _cholesky_on_host(A: Array) -> tuple[Array, Array]:
    L, info = torch.linalg.cholesky_ex(torch.from_numpy(A))
    return L.numpy(), info.numpy() == 0


def _inverse(L: Tensor) -> Tensor:
    found: Tensor = torch.linalg.solve_triangular(L, identity(L.shape[-1], L.device), upper=False)
    return found


def _solved(L: Tensor, right: Tensor) -> Tensor:
    found: Tensor = torch.linalg.solve_triangular(L.mT, right, upper=True)
    return found


def _brought(values: Tensor, residual: Tensor, rest: Tensor) -> list[Any]:
    """All at once: a synchronisation takes longer than what it brings."""
    f, table = values.shape[1], torch.cat([values, residual, rest[:, None]], dim=1).tolist()
    return [[line[:f] for line in table], [line[f:-1] for line in table], [line[-1] for line in table]]


HOST = Arithmetic(
    at_hand=True,
    taken=lambda made: made.cpu().numpy().reshape(-1, *made.shape[-2:]),
    given=torch.from_numpy,
    numbers=lambda *arrays: [array.tolist() for array in arrays],
    empty=lambda shape, beside: np.empty(shape),
    array=lambda numbers, beside: np.array(numbers),
    both=lambda one, other: [float(one), float(other)],
    descending=lambda Y, count: Y[..., ::-1][..., :count].copy(),
    where=np.where,
    at_least=np.maximum,
    at_most=np.minimum,
    product=lambda A, B: A @ B if A.size * B.shape[-1] < _ALONE else _on_host(torch.matmul)(A, B),
    cholesky=_cholesky_on_host,
    inverse=_on_host(_inverse),
    solved=_on_host(_solved),
    eigh=_on_host(torch.linalg.eigh),
    eigvalsh=_on_host(torch.linalg.eigvalsh),
    largest=lambda A: _on_host(torch.linalg.eigvalsh)(A)[:, -1],
)
DEVICE = Arithmetic(
    at_hand=False,
    taken=lambda made: made.reshape(-1, *made.shape[-2:]),
    given=lambda array: array,
    numbers=_brought,
    empty=lambda shape, beside: beside.new_empty(shape),
    array=lambda numbers, beside: beside.new_tensor(numbers),
    both=lambda one, other: torch.stack([one, other]).tolist(),
    descending=lambda Y, count: Y.flip(-1)[..., :count],
    where=torch.where,
    at_least=torch.clamp_min,
    at_most=torch.minimum,
    product=torch.matmul,
    cholesky=_cholesky,
    inverse=_inverse,
    solved=_solved,
    eigh=eigen.eigh,
    eigvalsh=eigen.eigvalsh,
    largest=eigen.largest,
)
