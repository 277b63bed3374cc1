# SPDX-License-Identifier: Apache-2.0
r"""Giving the system's memory back while a file is read from its beginning to its end.

# Note [Pages that go round]
A plain copy leaves source and copy in the page cache, so every page that is written needs a fresh one, and fresh pages
are the dearest part of a copy from a cold disk: the system has to find, and on a virtual machine to be lent, twice the
checkpoint's size. Source pages that nobody held before are given back a few megabytes behind the reader, and hold the
copy next. What was in memory before the copy stays there, and so does what will be read again.
"""

import os

BEHIND = 8 << 20
"""Bytes that are given back at once."""

_PROBES = 16


class Recycler:
    r"""Follows one reader through one file.

    Args:
        fd: the open source.
        size: its bytes.
    """

    def __init__(self, fd: int, size: int) -> None:
        r"""See the class."""
        self._cold = hasattr(os, "posix_fadvise") and is_cold(fd, size)
        self._begin = self._end = 0

    def passed(self, fd: int, begin: int, end: int, keep: bool) -> None:
        r"""Take note that a span has been read.

        Args:
            fd: the source, which may have been opened anew.
            begin: first byte; where the last span ended.
            end: first byte after it.
            keep: whether it will be read again soon.
        """
        if keep:
            self.release(fd)
            self._begin = end
        elif self._end - self._begin >= BEHIND:
            self.release(fd)
            self._begin = begin
        self._end = end

    def release(self, fd: int) -> None:
        r"""Give back what has been read.

        Args:
            fd: the source.
        """
        if self._cold and self._end > self._begin:
            os.posix_fadvise(fd, self._begin, self._end - self._begin, os.POSIX_FADV_DONTNEED)


def is_cold(fd: int, size: int) -> bool:
    r"""Tell whether a file has to be fetched from the disk.

    Args:
        fd: the open file.
        size: its bytes.

    Returns:
        True where hardly any of its pages are in memory; False where they are, or the system does not tell.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryFile() as file:
        ...     _ = file.write(bytes(100_000))
        ...     file.flush()
        ...     is_cold(file.fileno(), 100_000)
        False
    """
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    byte = bytearray(1)
    hits = 0
    for probe in range(_PROBES):
        try:
            hits += os.preadv(fd, [byte], (2 * probe + 1) * size // (2 * _PROBES), os.RWF_NOWAIT)
        except BlockingIOError:
            continue  # it would have to wait for the disk
        except OSError:
            return False  # a file system that cannot tell
    return hits <= _PROBES // 4
