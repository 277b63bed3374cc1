# SPDX-License-Identifier: Apache-2.0
r"""One ``.safetensors`` file: eight bytes of header length, a JSON header, one gap-free buffer.

The reference readers accept headers that mean different things to different readers (duplicate keys: the last
one wins). A tool that rewrites checkpoints must not guess, so this parser is stricter than they are; every
file that the ``safetensors`` library writes passes.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from pss_param.errors import CheckpointError

from .layout import Layout
from .stored import Chunk, StoredTensor, dense_strides
from .transfer import read_exact

MAX_HEADER = 100_000_000
"""Bytes; the format's own limit."""

MAX_DIMENSIONS = 64
"""More than torch can work with; it also keeps the product of hostile sizes short."""

DENSE = 16
"""Bytes of JSON for each list or object, at least, in a large header; every tensor needs 18. Empty lists take memory
of twenty times their text."""

LFS_POINTER = b"version https://git-lfs"

_BITS: dict[str, tuple[int, torch.dtype | None]] = {
    "BOOL": (8, torch.bool),
    "U8": (8, torch.uint8),
    "I8": (8, torch.int8),
    "U16": (16, torch.uint16),
    "I16": (16, torch.int16),
    "U32": (32, torch.uint32),
    "I32": (32, torch.int32),
    "U64": (64, torch.uint64),
    "I64": (64, torch.int64),
    "F16": (16, torch.float16),
    "BF16": (16, torch.bfloat16),
    "F32": (32, torch.float32),
    "F64": (64, torch.float64),
    "C64": (64, torch.complex64),
    "F8_E4M3": (8, torch.float8_e4m3fn),
    "F8_E5M2": (8, torch.float8_e5m2),
    "F8_E4M3FNUZ": (8, torch.float8_e4m3fnuz),
    "F8_E5M2FNUZ": (8, torch.float8_e5m2fnuz),
    "F8_E8M0": (8, torch.float8_e8m0fnu),
    "F4": (4, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
}


@dataclass(frozen=True)
class Entry:
    r"""One line of a header.

    Args:
        dtype: the format's name of the type.
        shape: the tensor's shape.
        begin: first byte, counted from the start of the buffer.
        end: first byte after it.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    r"""A parsed and checked header.

    Args:
        entries: by tensor name, in the header's order.
        metadata: the free texts under ``__metadata__``, or None.
        data: byte position of the buffer in the file.
    """

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str] | None
    data: int


class SafetensorsLayout(Layout):
    r"""A single ``.safetensors`` file.

    Args:
        path: the file.

    Example:
        >>> import tempfile, safetensors.torch
        >>> path = Path(tempfile.mkdtemp()) / "tiny.safetensors"
        >>> safetensors.torch.save_file({"w": torch.eye(2)}, path)
        >>> with SafetensorsLayout(path) as layout:
        ...     layout.tensors["w"].shape, layout.read("w").sum().item()
        ((2, 2), 2.0)
    """

    format = "safetensors"

    def __init__(self, path: Path) -> None:
        r"""See the class."""
        super().__init__(path, {path.name: path})
        self.header = Header({}, None, 8)

    def _parse(self) -> Mapping[str, StoredTensor]:
        file = self.path.name
        self.header = read_header(self.fd(file), self.stat(file).st_size, self.path)
        return {name: stored_tensor(file, self.header, name) for name in self.header.entries}


def stored_tensor(file: str, header: Header, name: str) -> StoredTensor:
    r"""Express one header entry in the terms of all formats.

    Args:
        file: relative name of the file.
        header: its header.
        name: which tensor.

    Returns:
        The tensor with one contiguous chunk.
    """
    entry = header.entries[name]
    chunk = Chunk(file, header.data + entry.begin, (0,) * len(entry.shape), entry.shape, dense_strides(entry.shape))
    storage = (file, chunk.offset, entry.shape) if entry.end > entry.begin else (file, name)
    return StoredTensor(name, _BITS[entry.dtype][1], entry.dtype, entry.shape, (chunk,), storage)


def read_header(fd: int, size: int, path: Path) -> Header:
    r"""Read and check a header.

    Args:
        fd: the open file.
        size: its length in bytes.
        path: for messages.

    Returns:
        The header.

    Raises:
        CheckpointError: any rule of the format is broken; the message names the file and the rule.
    """
    try:
        return _read_header(fd, size)
    except ValueError as error:
        what, way_out = (*error.args, "copy it again, or name an earlier checkpoint")[:2]
        raise CheckpointError(f"{path} is not a usable safetensors file: {what}; {way_out}") from None


def _read_header(fd: int, size: int) -> Header:
    if size < 8:
        raise ValueError(f"it has {size} bytes, a header length alone has 8; it was cut off or never written")
    start = bytes(read_exact(fd, 0, min(size, len(LFS_POINTER))))
    if start == LFS_POINTER:
        raise ValueError("it is a Git LFS pointer, not the file itself", "run `git lfs pull` first")
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER:
        raise ValueError(f"its header would have {length} bytes, the format allows {MAX_HEADER}")
    if length > size - 8:
        raise ValueError(
            f"its header would have {length} bytes, the file has {size - 8} after the length; it was cut off"
        )
    return parse_header(bytes(read_exact(fd, 8, length)), size - 8 - length)


def parse_header(text: bytes, buffer: int) -> Header:
    r"""Check the JSON of a header against the size of the buffer that follows it.

    Args:
        text: the header, padding included.
        buffer: bytes after it.

    Returns:
        The header.

    Raises:
        ValueError: a rule is broken.

    Example:
        >>> text = b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
        >>> parse_header(text, 8).entries["w"].shape
        (2,)
        >>> parse_header(text, 9)
        Traceback (most recent call last):
        ValueError: its tensors end at byte 8 of the buffer, the buffer has 9 bytes
    """
    table = _load_json(text)
    metadata = table.pop("__metadata__", None)
    if metadata is not None and not _is_text_map(metadata):
        raise ValueError("its __metadata__ must map texts to texts")
    entries = {name: _entry(name, value) for name, value in table.items()}
    _check_coverage(entries, buffer)
    return Header(entries, metadata, 8 + len(text))


def check_dense(text: bytes) -> None:
    r"""Refuse JSON of many megabytes that consists of brackets.

    Args:
        text: the JSON.

    Raises:
        ValueError: it holds more lists and objects than names and numbers.
    """
    brackets = text.count(b"[") + text.count(b"{") if len(text) > 4 << 20 else 0
    if brackets * DENSE > len(text):
        raise ValueError(f"it holds {brackets} lists and objects in {len(text)} bytes, which no such file has")


def _load_json(text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise ValueError("its header is no JSON object; this is some other kind of file")
    check_dense(text)
    try:
        # The format is UTF-8; json alone would also guess UTF-16 and UTF-32.
        table = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("its header is not UTF-8") from None
    if not isinstance(table, dict):
        raise ValueError("its header is no JSON object")
    return table


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"its header has the key {key!r} twice, so readers would disagree")
        table[key] = value
    return table


def _no_constant(word: str) -> Any:
    raise ValueError(f"its header holds {word}, which is no JSON")


def _is_text_map(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _entry(name: str, value: object) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{name!r} has the unknown dtype {str(dtype)[:40]!r}")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!r} must have a shape and two offsets of whole numbers from 0 to 2**63 - 1")
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{name!r} has {len(shape)} dimensions, torch reads at most {MAX_DIMENSIONS}")
    begin, end = offsets
    bits = prod(shape) * _BITS[dtype][0]
    if bits % 8 or end - begin != bits // 8:
        raise ValueError(f"{name!r} needs {bits} bits for its shape, its offsets span {end - begin} bytes")
    return Entry(dtype, tuple(shape), begin, end)


def _is_sizes(value: object) -> bool:
    # bool is a subclass of int: compare the type itself.
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def _check_coverage(entries: Mapping[str, Entry], buffer: int) -> None:
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            kind = "overlaps the tensor before it" if entry.begin < position else "leaves a hole before it"
            raise ValueError(f"{name!r} {kind}: it begins at byte {entry.begin} of the buffer, not {position}")
        position = entry.end
    if position != buffer:
        raise ValueError(f"its tensors end at byte {position} of the buffer, the buffer has {buffer} bytes")
