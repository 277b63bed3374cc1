# SPDX-License-Identifier: Apache-2.0
r"""Products of float32 matrices by oneDNN, which uses the whole of a vector unit where MKL does not.

# Note [Two libraries]
torch gives a float32 product of a CPU to MKL, which leaves the upper half of 512-bit registers to the CPUs of one
maker. oneDNN, which torch has for its layers and which ``torch.compile`` calls for every ``Linear``, uses them on all.
On two cores of an AMD Zen 5 it takes 0.4 to 0.8 of the time for thin blocks and 0.4 to 0.5 for square matrices
(``X W^T`` in ms, MKL and oneDNN; 2048 x 2048: 8 columns 0.57 and 0.40, 16 0.81 and 0.59, 64 2.7 and 1.4, 2048 77 and
36). With 256-bit registers the two are equal, so it serves where torch itself uses 512 bits
(``torch.backends.cpu.get_cpu_capability()``), and not where ``torch.backends.mkldnn.enabled`` says no. CPUs of other
makers have not been measured.

The matrix has to be stored by rows or by columns without a gap: others go to a kernel that takes a thousand times as
long; and each of its sides is to be 64 at least. Small products are left to MKL, which is called faster: those with
512 x 512 from 24 rows on, and with 768 x 768 from 8 on, are not. Of a shape that it has not seen before the library
prepares the product, for a millisecond or so, so it is of no use for blocks that grow.

Its sums have many terms, one after the other. Where all are equal that loses what it would not in shorter sums (4096 of
them: 80 rounding units of a norm, MKL 17). The certificate counts 4 units times the root of the number of terms; Gram
matrices, of which less is counted, add shorter ones (:mod:`pss_param.whole`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

__all__ = ["product", "serves"]

_LEAST = 1 << 23  # what is to be gained, in elements, less than what a call of torch.ops costs
_LEAST_SIDE = 64  # of the matrix: sums of few terms, and few sums, take longer
_GAIN_OF_READING = 8  # rows: what is gained on a matrix even if there is but one


def serves(W: Tensor, rows: int) -> bool:
    """Whether :func:`product` takes less time than torch's.

    Args:
        W: the matrix behind.
        rows: how many are before it.

    Returns:
        The answer; no for batches, for other dtypes and devices, and for matrices with gaps.
    """
    return (
        (rows + _GAIN_OF_READING) * W.numel() >= _LEAST
        and W.dtype == torch.float32
        and W.dim() == 2
        and min(W.shape) >= _LEAST_SIDE
        and W.device.type == "cpu"
        and (W.is_contiguous() or W.mT.is_contiguous())
        and bool(torch.backends.mkldnn.enabled)
        and _linear() is not None
    )


def product(rows: Tensor, W: Tensor) -> Tensor:
    """``rows @ W``, by oneDNN where that serves.

    Args:
        rows: ``(b, m)``.
        W: ``(m, n)``.

    Returns:
        ``(b, n)``, its rows contiguous.

    Example:
        >>> product(torch.ones(1, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([[4., 6.]])
    """
    linear = _linear() if serves(W, rows.shape[0]) else None
    return rows @ W if linear is None else linear(rows, W.mT, None, "none", [], "")


@cache
def _linear() -> Callable[..., Tensor] | None:
    """``X W^T`` by oneDNN; ``None`` where torch comes without it, or gains nothing by it."""
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not built or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    # The newer name is the library's own; torch moves its operations there.
    found = [getattr(space, "_linear_pointwise", None) for space in (torch.ops.mkldnn, torch.ops.onednn)]
    return next((each.default for each in found if each is not None), None)
