# SPDX-License-Identifier: Apache-2.0
r"""One tensor of a checkpoint: what it is, where its bytes are, and how they are read and written there."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .transfer import read_exact, tensor_bytes, tensor_from, write_all


@dataclass(frozen=True)
class Chunk:
    r"""A rectangular piece of a tensor that lies in one file.

    Args:
        file: name of the file, relative to the checkpoint's root.
        offset: byte position in that file of the piece's first element.
        origin: index in the tensor of the piece's first element.
        shape: extent of the piece.
        strides: in elements, as :meth:`torch.Tensor.stride`; non-negative.
    """

    file: str
    offset: int
    origin: tuple[int, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        r"""Where the piece sits in its tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.origin, self.shape, strict=True))

    @property
    def span(self) -> int:
        r"""Elements from the first to the last one, both included, gaps counted; 0 for an empty piece."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True))

    @property
    def contiguous(self) -> bool:
        r"""Whether the piece fills its span in row-major order."""
        return all(
            size < 2 or step == dense
            for size, step, dense in zip(self.shape, self.strides, dense_strides(self.shape), strict=True)
        )


@dataclass(frozen=True)
class StoredTensor:
    r"""One named tensor of a checkpoint.

    Args:
        name: the key it is stored under.
        dtype: its type in torch, or None where torch has none (4- and 6-bit floats).
        dtype_name: its type in the words of the format.
        shape: its logical shape.
        chunks: the pieces that make it up; they cover it once.
        storage: equal for two names that share the same bytes (tied weights), different otherwise.
    """

    name: str
    dtype: torch.dtype | None
    dtype_name: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    storage: Hashable

    @property
    def floating(self) -> bool:
        r"""Whether it holds floating-point numbers that torch can read."""
        return self.dtype is not None and self.dtype.is_floating_point

    @property
    def nbytes(self) -> int:
        r"""Bytes of its elements, gaps not counted; 0 where torch has no such type."""
        return 0 if self.dtype is None else self.dtype.itemsize * _product(self.shape)


def load(stored: StoredTensor, fd: Callable[[str], int]) -> Tensor:
    r"""Read one tensor.

    Args:
        stored: where it lies; of a type that torch has.
        fd: gives the open file of a relative name.

    Returns:
        A fresh contiguous CPU tensor of the stored dtype and shape.
    """
    whole = torch.empty(0, dtype=stored.dtype)
    first = stored.chunks[0]
    if first.contiguous and first.shape == stored.shape:
        return load_chunk(fd(first.file), first, whole.dtype).view(stored.shape)
    whole = whole.new_empty(stored.shape)
    for chunk in stored.chunks:
        piece = load_chunk(fd(chunk.file), chunk, whole.dtype)
        whole[chunk.slices] = piece.as_strided(chunk.shape, chunk.strides)
    return whole


def store(fd: int, chunk: Chunk, value: Tensor) -> tuple[int, int]:
    r"""Write a tensor's values over one of its chunks.

    Args:
        fd: the copy, open for reading and writing.
        chunk: where.
        value: the whole tensor, on the CPU, in the stored dtype.

    Returns:
        ``(offset, count)`` of the bytes that were written.
    """
    piece = value[chunk.slices]
    if chunk.contiguous:
        data = piece.contiguous()
    else:
        # The gaps belong to other tensors of the same storage: take them from the copy, where those may be
        # patched.
        data = load_chunk(fd, chunk, value.dtype)
        data.as_strided(chunk.shape, chunk.strides).copy_(piece)
    write_all(fd, chunk.offset, tensor_bytes(data))
    return chunk.offset, data.nbytes


def dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    r"""Strides of a contiguous row-major tensor.

    Args:
        shape: its shape.

    Returns:
        In elements.

    Example:
        >>> dense_strides((2, 3, 4))
        (12, 4, 1)
    """
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def load_chunk(fd: int, chunk: Chunk, dtype: torch.dtype) -> Tensor:
    r"""Read the span of one chunk.

    Args:
        fd: the open file.
        chunk: where.
        dtype: type of its elements.

    Returns:
        One-dimensional, from the first to the last element, gaps included.
    """
    return tensor_from(read_exact(fd, chunk.offset, chunk.span * dtype.itemsize), dtype)


def _product(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
