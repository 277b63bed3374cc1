# SPDX-License-Identifier: Apache-2.0
r"""Products in the full precision of their type, whatever the program around them has chosen for its own.

``torch.set_float32_matmul_precision("high")``, in nearly every training script for a GPU, makes products of float32
keep 10 bits of the mantissa (TF32; ``"medium"`` 7 on some CPUs), and autocast makes them bfloat16's. A residual that is
measured so is rounding, and a certificate that rests on it says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch

__all__ = ["full_precision"]


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    r"""Multiply in full precision inside of the block, and as before behind it.

    The setting is the process's, as in torch itself: other threads multiply in full precision meanwhile. Not for
    programs under ``torch.compile``, which cannot set the precision of their products.

    Args:
        device: where the products are.

    Returns:
        The block's context; one that does nothing where there is nothing to set.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16), full_precision(torch.device("cpu")):
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """
    if torch.is_autocast_enabled(device.type) or not _is_ieee(device.type):
        return _set(device.type)
    return nullcontext()


@contextmanager
def _set(kind: str) -> Iterator[None]:
    with torch.autocast(kind, enabled=False), _ieee(kind):
        yield


def _is_ieee(kind: str) -> bool:
    products = _products(kind)
    return products is not None and products.fp32_precision in {"ieee", "none"}


@contextmanager
def _ieee(kind: str) -> Iterator[None]:
    products = _products(kind)
    if products is None:
        with _ieee_before_2_9():
            yield
        return
    before = products.fp32_precision
    if before in {"ieee", "none"}:
        yield
        return
    products.fp32_precision = "none"
    own = "none" if products.fp32_precision == before else before  # what was inherited is to be so again
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        products.fp32_precision = own


@cache
def _products(kind: str) -> Any:
    backend: Any = torch.backends.cuda.matmul if kind == "cuda" else getattr(torch.backends.mkldnn, "matmul", None)
    return backend if hasattr(backend, "fp32_precision") else None


@contextmanager
def _ieee_before_2_9() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
