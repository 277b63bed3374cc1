# SPDX-License-Identifier: Apache-2.0
r"""Reading a finished copy again: what was not repaired must be as in the source."""

import zlib
from collections.abc import Iterable, Iterator, Sequence

from .layout import Layout
from .streaming import Advance, blocks
from .transfer import LOOK, read_into

Spans = Iterable[tuple[int, int]]
"""First byte and first byte after each span, in ascending order."""


def first_damage(
    layout: Layout, file: str, fd: int, sums: Sequence[int], patches: Sequence[tuple[int, int]], advance: Advance
) -> int | None:
    r"""Compare a patched copy with the sums that were taken as it was copied.

    Of a block that is patched in part the rest is compared with the source.

    Args:
        layout: the open source.
        file: relative name of the file.
        fd: the copy, open for reading.
        sums: CRC-32 of every block, see :class:`.streaming.Streamer`.
        patches: ``(offset, count)`` of what was changed since, in any order.
        advance: told of every step's bytes.

    Returns:
        A byte position at or shortly before the first difference, or None where there is none.
    """
    view = memoryview(bytearray(LOOK))
    spans = list(untouched(layout.stat(file).st_size, patches))
    at = 0
    for block, expected in zip(blocks(layout, file), sums, strict=True):
        while at < len(spans) and spans[at][1] <= block.begin:
            at += 1
        inside = list(_clipped(spans, at, block.begin, block.end))
        if inside != [(block.begin, block.end)]:
            found = first_difference(layout.fd(file), fd, inside, advance)
            if found is not None:
                return found
            continue
        count = block.end - block.begin
        read_into(fd, block.begin, view[:count])
        if zlib.crc32(view[:count]) != expected:
            return block.begin
        advance(count)
    return None


def _clipped(spans: Sequence[tuple[int, int]], first: int, begin: int, end: int) -> Iterator[tuple[int, int]]:
    for number in range(first, len(spans)):
        if spans[number][0] >= end:
            return
        yield max(spans[number][0], begin), min(spans[number][1], end)


def untouched(size: int, patches: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    r"""The spans of a file that no patch covers.

    Args:
        size: bytes of the file.
        patches: ``(offset, count)``, in any order; may overlap.

    Yields:
        tuple[int, int]: first byte and first byte after each span.

    Example:
        >>> list(untouched(10, [(4, 2), (0, 1), (5, 3)]))
        [(1, 4), (8, 10)]
    """
    position = 0
    for offset, count in sorted(patches):
        if offset > position:
            yield position, offset
        position = max(position, offset + count)
    if position < size:
        yield position, size


def first_difference(one: int, other: int, spans: Spans, advance: Advance) -> int | None:
    r"""Compare spans of two open files.

    Args:
        one: an open file.
        other: an open file.
        spans: which.
        advance: told of every step's bytes.

    Returns:
        A byte position at or shortly before the first difference, exact to 4 KiB, or None where there is none.
    """
    left, right = bytearray(LOOK), bytearray(LOOK)
    for begin, end in spans:
        for at in range(begin, end, LOOK):
            count = min(LOOK, end - at)
            read_into(one, at, memoryview(left)[:count])
            read_into(other, at, memoryview(right)[:count])
            # What is left of the longer block before was equal then and does not disturb.
            if left != right:
                return at + next(i for i in range(0, count, 4096) if left[i : i + 4096] != right[i : i + 4096])
            advance(count)
    return None
