# SPDX-License-Identifier: Apache-2.0
r"""Copying a checkpoint's file and looking at it on the way.

# Note [One look while it is at hand]
A repair has to see every value once, for NaN, and a careful one reads what it wrote. Done one after the other that is
three passes over a file that may be larger than the page cache, and each waits for the disk. So both are done on every
block while it is at hand: what a plain copy does not pay for is then only work of the processor.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from pss_param.finite import count_nonfinite

from .layout import Layout
from .transfer import LOOK, read_into, tensor_from, write_all

AHEAD = 32 << 20
"""Bytes that the system is asked to fetch ahead, so that the disk works while the processor looks."""

Advance = Callable[[int], None]
"""Called with a number of bytes that are done."""


@dataclass(frozen=True)
class Piece:
    r"""A span of a file that holds elements of floating-point tensors, or bytes of anything else.

    Args:
        begin: first byte.
        end: first byte after it.
        names: the tensors whose elements these are, all of the same type; empty for other bytes.
    """

    begin: int
    end: int
    names: tuple[str, ...] = ()


@dataclass
class Streamer:
    r"""Copies files and counts NaN and infinity in them.

    Args:
        layout: the open source.
        check: whether to read every block again after it was written.
        advance: told of every step's bytes.

    Attributes:
        counts: non-finite elements by tensor name, of every tensor that was seen whole.
    """

    layout: Layout
    check: bool
    advance: Advance
    counts: dict[str, int] = field(default_factory=dict)
    _buffer: bytearray = field(default_factory=lambda: bytearray(LOOK))
    _again: bytearray = field(default_factory=lambda: bytearray(LOOK))

    def copy(self, file: str, fd: int) -> int | None:
        r"""Copy one file.

        Args:
            file: its relative name.
            fd: the copy, open for reading and writing.

        Returns:
            None, or a byte position shortly before which the copy does not read back as the source.
        """
        for piece in pieces(self.layout, file):
            for at in range(piece.begin, piece.end, LOOK):
                if not self._block(file, fd, at, min(LOOK, piece.end - at), piece.names):
                    return at
        return None

    def _block(self, file: str, fd: int, at: int, count: int, names: tuple[str, ...]) -> bool:
        if at % (AHEAD // 4) < count and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.layout.fd(file), at, AHEAD, os.POSIX_FADV_WILLNEED)
        view = memoryview(self._buffer)[:count]
        read_into(self.layout.fd(file), at, view)
        write_all(fd, at, view)
        if self.check:
            read_into(fd, at, memoryview(self._again)[:count])
            # What is left of a longer block before was equal then and does not disturb.
            if self._again != self._buffer:
                return False
        if names:
            dtype = self.layout.dtype(names[0])
            bad = count_nonfinite([tensor_from(self._buffer, dtype)[: count // dtype.itemsize]])
            for name in names:
                self.counts[name] = self.counts.get(name, 0) + bad
        self.advance(count)
        return True


def pieces(layout: Layout, file: str) -> Iterator[Piece]:
    r"""Cut a file at the borders of the tensors that can be looked at in passing.

    Tensors that lie in several pieces or with gaps, or over another, are left to a look of their own.

    Args:
        layout: the open source.
        file: relative name of the file.

    Yields:
        Piece: in the order of the file, together covering every byte once.
    """
    position, size = 0, layout.stat(file).st_size
    for (begin, end, _), names in sorted(_spans(layout, file).items()):
        if begin < position or end > size:
            continue
        if begin > position:
            yield Piece(position, begin)
        yield Piece(begin, end, tuple(names))
        position = end
    if position < size:
        yield Piece(position, size)


def _spans(layout: Layout, file: str) -> Mapping[tuple[int, int, str], list[str]]:
    found: dict[tuple[int, int, str], list[str]] = {}
    for name, stored in layout.tensors.items():
        if not stored.floating or len(stored.chunks) != 1 or not stored.nbytes:
            continue
        (chunk,) = stored.chunks
        if chunk.file == file and chunk.contiguous:
            span = (chunk.offset, chunk.offset + stored.nbytes, stored.dtype_name)
            found.setdefault(span, []).append(name)
    return found
