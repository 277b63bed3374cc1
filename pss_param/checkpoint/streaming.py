# SPDX-License-Identifier: Apache-2.0
r"""Copying a checkpoint's files and looking at them on the way.

# Note [One look while it is at hand]
A repair has to see every value once, for NaN, and a careful one reads what it wrote. Done one after the other that is
three passes over files that may be larger than the page cache, and each waits for the disk. So every block is read
from the source once, and counted, written and checked while it is at hand:

- a file in which nothing will change is read back block by block, and compared with the block in memory;
- of a file that will be changed a CRC-32 of every block is kept, and the finished copy is read once and compared with
  those (:mod:`.checking`). What was patched by then is compared with what was to be written there.

Either way each byte of the source is read once and each byte of the copy is read back once, through the operating
system: it proves that the system holds the copy as it should be, not that the disk's surface does.
"""

import zlib
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

from pss_param.finite import count_nonfinite

from .layout import Layout
from .recycling import Recycler
from .transfer import LOOK, read_into, tensor_from, write_all

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
        check: whether the copy is to be checked.
        advance: told of every step's bytes.
        changing: names of the tensors that may be changed in the copy, and are read from the source for that.

    Attributes:
        counts: non-finite elements by tensor name, of every tensor that was seen whole.
        sums: CRC-32 of every block, in the order of :func:`blocks`, by file that holds a tensor of ``changing``.
    """

    layout: Layout
    check: bool
    advance: Advance
    changing: Collection[str] = ()
    counts: dict[str, int] = field(default_factory=dict)
    sums: dict[str, "array[int]"] = field(default_factory=dict)
    _buffer: bytearray = field(default_factory=lambda: bytearray(LOOK))
    _again: bytearray = field(default_factory=lambda: bytearray(LOOK))

    def __post_init__(self) -> None:
        r"""Find the files that will be changed."""
        if self.check:
            found = {chunk.file for name in self.changing for chunk in self.layout.find(name).chunks}
            self.sums = {file: array("I") for file in found}

    def copy(self, file: str, fd: int) -> int | None:
        r"""Copy one file.

        Args:
            file: its relative name.
            fd: the copy, open for reading and writing.

        Returns:
            None, or a byte position shortly before which the copy does not read back as the source.
        """
        trail = Recycler(self.layout.fd(file), self.layout.stat(file).st_size)
        for block in blocks(self.layout, file):
            if not self._block(file, fd, block):
                return block.begin
            keep = any(name in self.changing for name in block.names)
            trail.passed(self.layout.fd(file), block.begin, block.end, keep)
        trail.release(self.layout.fd(file))
        return None

    def _block(self, file: str, fd: int, block: Piece) -> bool:
        count = block.end - block.begin
        view = memoryview(self._buffer)[:count]
        read_into(self.layout.fd(file), block.begin, view)
        write_all(fd, block.begin, view)
        if file in self.sums:
            self.sums[file].append(zlib.crc32(view))
        elif self.check:
            read_into(fd, block.begin, memoryview(self._again)[:count])
            if not self._equal(count):
                return False
        self._count(block)
        self.advance(count)
        return True

    def _equal(self, count: int) -> bool:
        if count == LOOK:  # without copies
            return self._again == self._buffer
        return self._again[:count] == self._buffer[:count]

    def _count(self, block: Piece) -> None:
        if not block.names:
            return
        dtype = self.layout.dtype(block.names[0])
        elements = tensor_from(self._buffer, dtype)[: (block.end - block.begin) // dtype.itemsize]
        bad = count_nonfinite([elements])
        for name in block.names:
            self.counts[name] = self.counts.get(name, 0) + bad


def blocks(layout: Layout, file: str) -> Iterator[Piece]:
    r"""Cut the pieces of a file into blocks that fit into a core's own cache.

    Args:
        layout: the open source.
        file: relative name of the file.

    Yields:
        Piece: in the order of the file, together covering every byte once; none over ``LOOK`` bytes.
    """
    for piece in pieces(layout, file):
        for at in range(piece.begin, piece.end, LOOK):
            yield replace(piece, begin=at, end=min(at + LOOK, piece.end))


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
    for name, stored in (*layout.state.items(), *layout.tensors.items()):
        if not stored.floating or len(stored.chunks) != 1 or not stored.nbytes:
            continue
        (chunk,) = stored.chunks
        if chunk.file == file and chunk.contiguous:
            span = (chunk.offset, chunk.offset + stored.nbytes, stored.dtype_name)
            found.setdefault(span, []).append(name)
    return found
