# SPDX-License-Identifier: Apache-2.0
r"""Moving bytes between open files and tensors with ``pread``/``pwrite``, never through a memory map.

A truncated source or a full disk under a memory map kills the process with SIGBUS; these calls raise
:class:`OSError` instead, which the command line turns into one line.
"""

import ctypes
import errno
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from pss_param.errors import CheckpointError

BLOCK = 16 << 20
"""Bytes that are moved or examined at once; memory beyond one tensor stays at this size."""

LOOK = 1 << 19
"""Bytes that are looked at once in passing: two such buffers stay in a core's own cache, where comparing and counting
cost less than fetching them from memory again."""

# copy_file_range answers with one of these where the file system, the kernel or the pair of files cannot do
# it.
_NO_KERNEL_COPY = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})


def read_exact(fd: int, offset: int, count: int) -> bytearray:
    r"""Read ``count`` bytes at ``offset``.

    Args:
        fd: an open file.
        offset: first byte.
        count: number of bytes.

    Returns:
        A fresh buffer of exactly ``count`` bytes; a file that ends before is refused.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryFile() as file:
        ...     _ = file.write(b"0123456789")
        ...     file.flush()
        ...     read_exact(file.fileno(), 2, 3)
        bytearray(b'234')
    """
    buffer = bytearray(count)
    read_into(fd, offset, memoryview(buffer))
    return buffer


def read_into(fd: int, offset: int, view: memoryview) -> None:
    r"""Fill a buffer with the bytes at ``offset``.

    Args:
        fd: an open file.
        offset: first byte.
        view: the buffer, writable bytes.

    Raises:
        CheckpointError: the file ends before the buffer is full.
    """
    done, count = 0, len(view)
    while done < count:
        # Linux moves at most 2 GiB - 4 KiB a call.
        got = os.preadv(fd, [view[done : done + (1 << 30)]], offset + done)
        if got == 0:
            raise CheckpointError(
                f"the file ends at byte {offset + done}, {count - done} bytes too early; "
                "it was truncated, perhaps while being read: copy it again"
            )
        done += got


def write_all(fd: int, offset: int, data: memoryview | bytes | bytearray) -> None:
    r"""Write all of ``data`` at ``offset``.

    Args:
        fd: a file open for writing.
        offset: first byte.
        data: what to write.
    """
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done : done + (1 << 30)], offset + done)


def copy_range(source: int, target: int, start: int, count: int, to: int | None = None) -> Iterator[int]:
    r"""Copy ``count`` bytes between files, inside the kernel (or as shared extents) where that is possible.

    Args:
        source: file to read.
        target: file to write.
        start: first byte in ``source``.
        count: number of bytes.
        to: first byte in ``target``; None for the same as ``start``.

    Yields:
        int: the number of bytes of each step, so that a caller can show progress.
    """
    to = start if to is None else to
    done, in_kernel = 0, hasattr(os, "copy_file_range")
    while done < count:
        step = min(4 * BLOCK, count - done)
        moved = _kernel_copy(source, target, start + done, step, to + done) if in_kernel else 0
        if moved == 0:
            # Either the kernel cannot, or the source is short: the plain read tells which.
            in_kernel = False
            moved = min(BLOCK, step)
            write_all(target, to + done, read_exact(source, start + done, moved))
        done += moved
        yield moved


def _kernel_copy(source: int, target: int, start: int, count: int, to: int) -> int:
    try:
        return os.copy_file_range(source, target, count, start, to)
    except OSError as error:
        if error.errno in _NO_KERNEL_COPY:
            return 0
        raise


def reserve(fd: int, size: int) -> None:
    r"""Give the file its full size on disk now, so that a full disk fails before any work is done.

    Args:
        fd: a file open for writing.
        size: bytes.
    """
    if size and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)
    else:
        os.ftruncate(fd, size)


def tensor_bytes(tensor: Tensor) -> memoryview:
    r"""The bytes of a contiguous CPU tensor, without a copy and without NumPy.

    The view is valid only while ``tensor`` lives.

    Args:
        tensor: any dtype, contiguous, on the CPU.

    Returns:
        A writable view of ``tensor.nbytes`` bytes.

    Example:
        >>> pair = torch.tensor([1, 256], dtype=torch.int16)
        >>> bytes(tensor_bytes(pair))
        b'\x01\x00\x00\x01'
    """
    if tensor.numel() == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def tensor_from(buffer: bytearray, dtype: torch.dtype) -> Tensor:
    r"""A one-dimensional tensor over a buffer, without a copy.

    Args:
        buffer: a whole number of elements.
        dtype: their type.

    Returns:
        ``(len(buffer) / itemsize,)``, sharing the buffer's memory.
    """
    return torch.frombuffer(buffer, dtype=dtype) if buffer else torch.empty(0, dtype=dtype)
