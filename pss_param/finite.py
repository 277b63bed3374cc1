# SPDX-License-Identifier: Apache-2.0
r"""Counting NaN and infinity in stored tensors, at the speed of reading them."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from pss_param.errors import NonFiniteError

SHOWN = 8
"""How many tensors a message names."""


def count_nonfinite(blocks: Iterable[Tensor]) -> int:
    r"""How many elements are NaN or infinite.

    Args:
        blocks: floating-point tensors of any float dtype.

    Returns:
        The count over all blocks.

    Example:
        >>> count_nonfinite([torch.tensor([1.0, float("nan")]), torch.tensor([float("-inf")])])
        2
    """
    return sum(_count(block) for block in blocks if block.numel())


def _count(block: Tensor) -> int:
    if _is_finite(block):
        return 0
    if block.dtype.itemsize == 1:  # fp8: no comparison of its own
        block = block.to(torch.float32)
    return block.numel() - int(torch.isfinite(block).sum())


# Bits of the smallest magnitude that is no number; everything above is none either. Other types are converted first.
_FIRST_BAD = {
    torch.float64: (np.int64, np.uint64, 0x7FF0_0000_0000_0000),
    torch.float32: (np.int32, np.uint32, 0x7F80_0000),
    torch.bfloat16: (np.int16, np.uint16, 0x7F80),
    torch.float16: (np.int16, np.uint16, 0x7C00),
    torch.float8_e5m2: (np.int8, np.uint8, 0x7C),
    torch.float8_e4m3fn: (np.int8, np.uint8, 0x7F),
}


def _is_finite(block: Tensor) -> bool:
    # Floats of one sign have the order of their bits as integers: the two largest integers, with and without sign,
    # tell. Twice as fast as torch's comparison, and without threads, for which other programs may leave no core free.
    if block.dtype not in _FIRST_BAD or block.device.type != "cpu" or not block.is_contiguous():
        return False
    signed, unsigned, bad = _FIRST_BAD[block.dtype]
    bits = block.detach().reshape(-1).view(torch.uint8).numpy()
    sign = 1 << (8 * block.dtype.itemsize - 1)
    return int(bits.view(signed).max()) < bad and int(bits.view(unsigned).max()) < sign + bad


def refuse_nonfinite(found: Mapping[str, int], where: str) -> None:
    r"""Refuse a checkpoint that holds NaN or infinity, naming the tensors.

    Args:
        found: number of non-finite elements by tensor name.
        where: the checkpoint, for the message.

    Raises:
        NonFiniteError: ``found`` is not empty.
    """
    if not found:
        return
    names = [f"{name} ({count})" for name, count in list(found.items())[:SHOWN]]
    rest = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    raise NonFiniteError(
        f"{where} holds NaN or infinity in {len(found)} tensor(s): {', '.join(names)}{rest}; "
        "what such values were cannot be computed: start from an earlier checkpoint, take these tensors from one with "
        "--nonfinite reference --reference GOOD, or --exclude what is to stay as it is"
    )
