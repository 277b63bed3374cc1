# SPDX-License-Identifier: Apache-2.0
r"""The zip container of ``torch.save``: where each record lies, and its check sum.

Zip readers disagree about files that contradict themselves (the list at the end against the headers before
the records, two records of one name, records over each other). A tool that patches bytes must not guess, so
this parser takes only archives that are stored uncompressed, say the same thing everywhere and hold each
byte once; every file that torch writes passes. An archive may lie inside a larger file, as the pieces of
distributed checkpoints do.
"""

import struct
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .transfer import BLOCK, read_exact, write_all

MAX_DIRECTORY = 256 << 20
"""Bytes of the list at the end; torch needs about 80 a tensor."""

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_ENCRYPTED, _DESCRIPTOR = 0x1, 0x8
_FULL = 0xFFFFFFFF
_CRC_IN_LOCAL, _CRC_IN_CENTRAL = 14, 16


@dataclass(frozen=True)
class Record:
    r"""One record of an archive; positions are in the file, not in the archive.

    Args:
        name: with the archive's own folder in front, such as ``"model/data/0"``.
        offset: first byte of its content.
        size: bytes of its content.
        crc: CRC-32 of its content, as the archive says.
        begin: first byte of its local header.
        end: first byte after its content and the descriptor that may follow it.
        sums: where its CRC-32 is written: in the list, and before or after the content.
    """

    name: str
    offset: int
    size: int
    crc: int
    begin: int
    end: int
    sums: tuple[int, ...]


def read_archive(fd: int, start: int, size: int) -> dict[str, Record]:
    r"""Find all records of an archive.

    Args:
        fd: the open file.
        start: first byte of the archive in the file.
        size: bytes of the archive.

    Returns:
        The records by name, in the order of the archive's list.

    Raises:
        ValueError: it is no zip archive, contradicts itself, or is compressed or encrypted.
    """
    count, begin, length = _find_directory(fd, start, size)
    if length > MAX_DIRECTORY:
        raise ValueError(f"the list of its records would have {length} bytes, at most {MAX_DIRECTORY} are read")
    listed = list(_directory(bytes(read_exact(fd, start + begin, length)), count, start + begin))
    records: dict[str, Record] = {}
    for entry in listed:
        if entry.name in records:
            raise ValueError(f"it has the record {entry.name[:200]!r} twice, so readers would disagree")
        records[entry.name] = _locate(fd, entry, start, start + begin)
    in_order = sorted(records.values(), key=lambda record: record.begin)
    for before, after in pairwise(in_order):
        if after.begin < before.end:
            raise ValueError(f"its records {before.name[:200]!r} and {after.name[:200]!r} overlap")
    return records


def _find_directory(fd: int, start: int, size: int) -> tuple[int, int, int]:
    if size < _END.size:
        raise ValueError(f"it has {size} bytes, an empty archive has {_END.size}; it was cut off")
    at = size - _END.size
    mark, disk, first, here, count, length, begin, comment = _END.unpack(read_exact(fd, start + at, _END.size))
    if mark != b"PK\5\6" or comment:
        raise ValueError("it does not end with the end of a zip archive; it was cut off or something was appended")
    wide = _find_wide(fd, start, at)
    if wide is not None:
        at, numbers = wide
        small = (disk, first, here, count, length, begin)
        if any(value not in (full, number) for value, full, number in zip(small, _LIMITS, numbers, strict=True)):
            raise ValueError("its two end records contradict each other")
        disk, first, here, count, length, begin = numbers
    if disk or first or here != count:
        raise ValueError("it is one part of several; join the parts first")
    if begin + length != at:
        raise ValueError(f"the list of its records should end at byte {at} of it, not {begin + length}")
    return count, begin, length


_LIMITS = (0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, _FULL, _FULL)


def _find_wide(fd: int, start: int, end: int) -> tuple[int, tuple[int, ...]] | None:
    at = end - _LOCATOR.size
    if at < _END64.size:
        return None
    mark, disk, position, disks = _LOCATOR.unpack(read_exact(fd, start + at, _LOCATOR.size))
    if mark != b"PK\6\7":
        return None
    if disk or disks != 1 or position + _END64.size != at:
        raise ValueError("the locator of its end record points elsewhere")
    mark, length, _, _, *numbers = _END64.unpack(read_exact(fd, start + position, _END64.size))
    if mark != b"PK\6\6" or length != _END64.size - 12:
        raise ValueError("its 64-bit end record is broken")
    return position, tuple(numbers)


@dataclass(frozen=True)
class _Listed:
    name: str
    raw: bytes
    flags: int
    size: int
    crc: int
    offset: int
    sum_at: int


def _directory(table: bytes, count: int, position: int) -> Iterator[_Listed]:
    at = 0
    for _ in range(count):
        if at + _CENTRAL.size > len(table):
            raise ValueError("the list of its records is shorter than its number of records")
        entry = _CENTRAL.unpack_from(table, at)
        mark, _, _, flags, method, _, _, crc, packed, size, name_size, extra_size, comment, disk, _, _, offset = entry
        name_at, end = at + _CENTRAL.size, at + _CENTRAL.size + name_size + extra_size + comment
        if mark != b"PK\1\2" or end > len(table) or disk:
            raise ValueError("the list of its records is broken")
        raw = table[name_at : name_at + name_size]
        extra = table[name_at + name_size : name_at + name_size + extra_size]
        size, packed, offset = _widen(extra, (size, packed, offset))
        name = _name(raw)
        _check_stored(name, flags, method, size == packed)
        yield _Listed(name, raw, flags, size, crc, offset, position + at + _CRC_IN_CENTRAL)
        at = end
    if at != len(table):
        raise ValueError("the list of its records is longer than its number of records")


def _name(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"it has a record whose name is not UTF-8: {raw[:40]!r}") from None


def _check_stored(name: str, flags: int, method: int, same_size: bool) -> None:
    if flags & _ENCRYPTED:
        raise ValueError(f"its record {name[:200]!r} is encrypted")
    if method or not same_size:
        raise ValueError(
            f"its record {name[:200]!r} is compressed, torch.save never does that; save it again with torch"
        )


def _widen(extra: bytes, values: Sequence[int]) -> tuple[int, ...]:
    # Numbers that do not fit stand in the 64-bit extra field, in this order, and only those.
    if _FULL not in values:
        return tuple(values)
    field = _extra(extra, 1)
    wanted = sum(value == _FULL for value in values)
    if field is None or len(field) < 8 * wanted:
        raise ValueError("it has a record over 4 GiB without its 64-bit size")
    wide = iter(struct.unpack_from(f"<{wanted}Q", field))
    return tuple(next(wide) if value == _FULL else value for value in values)


def _extra(extra: bytes, wanted: int) -> bytes | None:
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == wanted:
            return extra[at + 4 : at + 4 + size]
        at += 4 + size
    return None


def _locate(fd: int, entry: _Listed, start: int, limit: int) -> Record:
    begin = start + entry.offset
    if begin + _LOCAL.size > limit:
        raise ValueError(f"its record {entry.name[:200]!r} begins outside the archive")
    header = _LOCAL.unpack(read_exact(fd, begin, _LOCAL.size))
    mark, _, flags, method, _, _, crc, packed, size, name_size, extra_size = header
    offset = begin + _LOCAL.size + name_size + extra_size
    if offset + entry.size > limit:
        raise ValueError(f"its record {entry.name[:200]!r} reaches outside the archive")
    names = bytes(read_exact(fd, begin + _LOCAL.size, name_size + extra_size))
    if mark != b"PK\3\4" or method or flags != entry.flags or names[:name_size] != entry.raw:
        raise ValueError(f"the header of its record {entry.name[:200]!r} contradicts the list")
    plain = _widen(names[name_size:], (size, packed))
    after = entry.flags & _DESCRIPTOR
    if (crc, *plain) != (entry.crc, entry.size, entry.size) and not (after and (crc, *plain) == (0, 0, 0)):
        raise ValueError(f"the header of its record {entry.name[:200]!r} contradicts the list")
    sums = [entry.sum_at] if after and not crc else [entry.sum_at, begin + _CRC_IN_LOCAL]
    end = offset + entry.size
    if after:
        sum_at, end = _descriptor(fd, entry, end, limit)
        sums.append(sum_at)
    return Record(entry.name, offset, entry.size, entry.crc, begin, end, tuple(sums))


def _descriptor(fd: int, entry: _Listed, at: int, limit: int) -> tuple[int, int]:
    # With or without a mark, with sizes of four or of eight bytes: whichever agrees with the list.
    text = bytes(read_exact(fd, at, min(24, limit - at)))
    for mark in (b"PK\7\10", b""):
        for width in "LQ":
            if width == "L" and entry.size > _FULL:
                continue
            whole = mark + struct.pack(f"<L2{width}", entry.crc, entry.size, entry.size)
            # Eight zero bytes of sizes look like four of them and the next header does not begin with zeros.
            if text.startswith(whole) and _ends_well(fd, at + len(whole), limit):
                return at + len(mark), at + len(whole)
    raise ValueError(f"the descriptor after its record {entry.name[:200]!r} contradicts the list")


def _ends_well(fd: int, at: int, limit: int) -> bool:
    return at == limit or (at + 2 <= limit and bytes(read_exact(fd, at, 2)) == b"PK")


def mend_archive(fd: int, records: Mapping[str, Record], patched: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    r"""Bring the check sums of patched records up to date.

    Args:
        fd: the patched file, open for reading and writing.
        records: as they were before.
        patched: ``(offset, count)`` of every patch in the file, in bytes.

    Returns:
        Names of the records whose sums were written.
    """
    touched = list(_touched(records, patched))
    for record in touched:
        text = struct.pack("<L", checksum(fd, record.offset, record.size))
        for at in record.sums:
            write_all(fd, at, text)
    return tuple(record.name for record in touched)


def sums_of(records: Mapping[str, Record], patched: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    r"""Where :func:`mend_archive` writes.

    Args:
        records: the archive's.
        patched: ``(offset, count)`` of every patch in the file, in bytes.

    Returns:
        ``(offset, count)`` of every check sum of a patched record.
    """
    return tuple((at, 4) for record in _touched(records, patched) for at in record.sums)


def _touched(records: Mapping[str, Record], patched: Sequence[tuple[int, int]]) -> Iterator[Record]:
    in_order = sorted((record for record in records.values() if record.size), key=lambda record: record.offset)
    starts = [record.offset for record in in_order]
    hit: set[int] = set()
    for offset, count in patched:
        if count:
            hit.update(range(max(bisect_right(starts, offset) - 1, 0), bisect_left(starts, offset + count)))
    return (in_order[at] for at in sorted(hit))


def checksum(fd: int, offset: int, count: int) -> int:
    r"""CRC-32 of a span of a file.

    Args:
        fd: the open file.
        offset: first byte.
        count: number of bytes.

    Returns:
        The sum that zip uses.
    """
    crc = 0
    for at in range(offset, offset + count, BLOCK):
        crc = zlib.crc32(read_exact(fd, at, min(BLOCK, offset + count - at)), crc)
    return crc
