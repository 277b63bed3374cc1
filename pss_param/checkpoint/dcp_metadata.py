# SPDX-License-Identifier: Apache-2.0
r"""``.metadata`` of a torch distributed checkpoint: which part of which tensor lies in which file.

torch reads it with an unrestricted ``pickle.load``, so a stranger's file runs what it likes. Here it is read for
its structure only, and it may mention nothing but the record types that torch itself writes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .pickled import Global, Made, read_pickle
from .torch_content import pairs_of, texts_of
from .torch_tensors import DTYPES, is_size, sizes_of

_METADATA = "torch.distributed.checkpoint.metadata."
_STORAGE_INFO = "torch.distributed.checkpoint.filesystem._StorageInfo"
_RECORDS = (
    "Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata TensorProperties MetadataIndex "
    "StorageMeta _MEM_FORMAT_ENCODING"
)
# Types in torch's namespace and the containers that planners put their notes into. Allowed means that a file may
# mention them; they are not imported either.
_ALLOWED = frozenset({
    *(_METADATA + name for name in _RECORDS.split()),
    _STORAGE_INFO,
    *DTYPES,
    "torch.Size", "torch.device", "torch.serialization._get_layout", "torch.strided",
    "collections.OrderedDict", "builtins.set", "builtins.getattr", "__builtin__.getattr",
    *(f"{module}.{kind}Path" for module in ("pathlib", "pathlib._local") for kind in ("", "Posix", "Windows", "Pure")),
    *(f"{module}.Pure{kind}Path" for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")),
})  # fmt: skip

MAX_PIECES = 4096
"""Of one tensor; about as many ranks as ever share one."""

Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Piece:
    r"""A part of a tensor in a file.

    Args:
        origin: index in the tensor of its first element.
        shape: its extent.
        file: relative name of the file.
        offset: first byte of its torch file in that file.
        length: bytes of it.
    """

    origin: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Recorded:
    r"""A tensor by its record.

    Args:
        name: flattened name.
        path: keys that led to it before flattening.
        dtype: its type, or None where torch has none such.
        dtype_name: the type's name in torch.
        shape: its shape.
        pieces: cover it once.
    """

    name: str
    path: Key
    dtype: torch.dtype | None
    dtype_name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class _Place:
    file: str
    offset: int
    length: int


def read_metadata(data: bytes) -> dict[str, Recorded]:
    r"""Read the records of all tensors.

    Args:
        data: content of ``.metadata``.

    Returns:
        The tensors by flattened name, in the order of the file; objects that are no tensors are left out.

    Raises:
        ValueError: it is no such file, mentions what does not belong there, or contradicts itself.
    """
    content = read_pickle(data, allowed=_ALLOWED.__contains__)
    fields = _fields(content, _METADATA + "Metadata")
    places = dict(_places(fields.get("storage_data")))
    paths = texts_of(fields.get("planner_data"))
    found: dict[str, Recorded] = {}
    for name, entry in texts_of(fields.get("state_dict_metadata")).items():
        if isinstance(entry, Made) and entry.path == _METADATA + "TensorStorageMetadata":
            found[name] = _recorded(name, entry, _path(name, paths.get(name)), places)
    if not found:
        raise ValueError("it records no tensor")
    return found


def _fields(node: Any, wanted: str) -> dict[str, Any]:
    if not isinstance(node, Made) or node.path != wanted or len(node.states) != 1:
        raise ValueError(f"it should hold a {wanted.rpartition('.')[2]} where it does not")
    return texts_of(node.states[0])


def _places(node: Any) -> Iterator[tuple[tuple[str, tuple[int, ...]], _Place]]:
    seen: set[tuple[str, tuple[int, ...]]] = set()
    for index, info in pairs_of(node) or ():
        fields = _fields(index, _METADATA + "MetadataIndex")
        name, offset = fields.get("fqn"), fields.get("offset")
        if not isinstance(name, str):
            raise ValueError("it has a piece without a name")
        key = name, () if offset is None else sizes_of(offset)
        if key in seen:
            raise ValueError(f"it places a piece of {name[:200]!r} twice")
        seen.add(key)
        yield key, _place(name, info)


def _place(name: str, node: Any) -> _Place:
    fields = _fields(node, _STORAGE_INFO)
    if fields.get("transform_descriptors"):
        raise ValueError(f"{name[:200]!r} is compressed or transformed; save the checkpoint without extensions")
    file, offset, length = (fields.get(key) for key in ("relative_path", "offset", "length"))
    if not isinstance(file, str) or not is_size(offset) or not is_size(length):
        raise ValueError(f"the place of {name[:200]!r} is broken")
    return _Place(file, offset, length)  # type: ignore[arg-type]  # is_size says that they are int


def _path(name: str, node: Any) -> Key:
    if isinstance(node, tuple) and node and all(isinstance(key, str | int) for key in node):
        return node
    return tuple(name.split("."))


def _recorded(name: str, node: Made, path: Key, places: Mapping[tuple[str, tuple[int, ...]], _Place]) -> Recorded:
    fields = _fields(node, _METADATA + "TensorStorageMetadata")
    shape, chunks = sizes_of(fields.get("size")), fields.get("chunks")
    if not isinstance(chunks, list) or len(chunks) > MAX_PIECES:
        raise ValueError(f"{name[:200]!r} has no list of at most {MAX_PIECES} pieces")
    pieces = tuple(_piece(name, chunk, places) for chunk in chunks)
    check_cover(name, shape, pieces)
    kind = _dtype_name(fields.get("properties"))
    return Recorded(name, path, DTYPES.get(kind), kind.removeprefix("torch."), shape, pieces)


def _piece(name: str, node: Any, places: Mapping[tuple[str, tuple[int, ...]], _Place]) -> Piece:
    fields = _fields(node, _METADATA + "ChunkStorageMetadata")
    origin, shape = sizes_of(fields.get("offsets")), sizes_of(fields.get("sizes"))
    place = places.get((name, origin))
    if place is None:
        raise ValueError(f"it says nowhere in which file the piece of {name[:200]!r} at {origin} lies")
    return Piece(origin, shape, place.file, place.offset, place.length)


def _dtype_name(node: Any) -> str:
    if not isinstance(node, Made) or node.path != _METADATA + "TensorProperties" or len(node.states) != 1:
        return "unknown"
    state = node.states[0]
    first = state[0] if isinstance(state, tuple) and state else texts_of(state).get("dtype")
    return first.path if isinstance(first, Global) else "unknown"


def check_cover(name: str, shape: tuple[int, ...], pieces: tuple[Piece, ...]) -> None:
    r"""Make sure that pieces cover a tensor once.

    Args:
        name: the tensor, for messages.
        shape: its shape.
        pieces: its parts.

    Raises:
        ValueError: a piece reaches outside, two overlap, or something is not covered.

    Example:
        >>> halves = (Piece((0, 0), (1, 4), "a", 0, 9), Piece((1, 0), (1, 4), "b", 0, 9))
        >>> check_cover("w", (2, 4), halves)
        >>> check_cover("w", (3, 4), halves)
        Traceback (most recent call last):
        ValueError: the pieces of 'w' have 8 elements, the tensor has 12
    """
    for piece in pieces:
        if not len(piece.origin) == len(piece.shape) == len(shape) or any(
            start + size > whole for start, size, whole in zip(piece.origin, piece.shape, shape, strict=True)
        ):
            raise ValueError(f"a piece of {name[:200]!r} reaches outside of its shape {shape}")
    have, wanted = sum(_volume(piece.shape) for piece in pieces), _volume(shape)
    if have != wanted:
        raise ValueError(f"the pieces of {name[:200]!r} have {have} elements, the tensor has {wanted}")
    _check_apart(name, sorted((piece for piece in pieces if _volume(piece.shape)), key=lambda piece: piece.origin))


def _check_apart(name: str, pieces: list[Piece]) -> None:
    near: list[Piece] = []
    for piece in pieces:
        # Sorted by the first dimension: those that end before this one begins are out of reach for good.
        near = [other for other in near if not piece.origin or other.origin[0] + other.shape[0] > piece.origin[0]]
        if any(_touch(piece, other) for other in near):
            raise ValueError(f"two pieces of {name[:200]!r} overlap")
        near.append(piece)


def _touch(one: Piece, other: Piece) -> bool:
    return all(
        a < c + d and c < a + b for a, b, c, d in zip(one.origin, one.shape, other.origin, other.shape, strict=True)
    )


def _volume(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
