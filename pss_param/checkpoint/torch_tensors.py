# SPDX-License-Identifier: Apache-2.0
r"""Tensors as torch pickles describe them: which elements of which storage."""

from dataclasses import dataclass
from typing import Any

import torch

from .pickled import Global, Made, Persistent, Table
from .stored import Chunk

MAX_DIMENSIONS = 64
_TYPES = (
    "float32 float64 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool complex64 complex128 "
    "complex32 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
)
DTYPES: dict[str, torch.dtype] = {f"torch.{name}": getattr(torch, name) for name in _TYPES.split()}
"""Types of torch by full name, those that fill whole bytes."""

_STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.storage.UntypedStorage": torch.uint8,
}
_PARAMETERS = frozenset({"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"})
_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
_PLAIN = {
    "torch._utils._rebuild_tensor": (4, 4),
    "torch._utils._rebuild_tensor_v2": (6, 7),
    "torch._utils._rebuild_tensor_v3": (7, 8),
}
_MAX_WRAPPERS = 8


@dataclass(frozen=True)
class View:
    r"""A strided tensor over a storage.

    Args:
        storage: the storage's key in the archive.
        nbytes: bytes of the storage.
        dtype: type of the elements.
        offset: elements of the storage before the first one.
        shape: its shape.
        strides: in elements.
    """

    storage: str
    nbytes: int
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        r"""Elements from the first to the last one; 0 for an empty tensor."""
        return self.chunk("", 0).span

    @property
    def begin(self) -> int:
        r"""First byte in the storage."""
        return self.offset * self.dtype.itemsize

    @property
    def end(self) -> int:
        r"""First byte in the storage after it."""
        return (self.offset + self.span) * self.dtype.itemsize

    @property
    def simple(self) -> bool:
        r"""Whether no element surely appears twice, as one does after ``expand``."""
        reach = 0
        for step, size in sorted((t, s) for t, s in zip(self.strides, self.shape, strict=True) if s > 1):
            if step <= reach:
                return False
            reach += (size - 1) * step
        return True

    def chunk(self, file: str, start: int) -> Chunk:
        r"""Place it in a file.

        Args:
            file: relative name of the file.
            start: byte position of the storage in that file.

        Returns:
            The whole tensor as one piece.
        """
        return Chunk(file, start + self.begin, (0,) * len(self.shape), self.shape, self.strides)


@dataclass(frozen=True)
class Opaque:
    r"""A tensor that is no plain strided one: sparse, quantised, a subclass with own content.

    Args:
        kind: what it is, for messages.
    """

    kind: str


def tensor_of(node: Any) -> View | Opaque | None:
    r"""Understand a pickled object as a tensor.

    Args:
        node: anything that :func:`read_pickle` gives.

    Returns:
        The tensor, or None where it is something else.

    Raises:
        ValueError: it says that it is a tensor, but no torch would make it.
    """
    for _ in range(_MAX_WRAPPERS):
        if not isinstance(node, Made):
            return None
        path, args = node.path, node.args
        if path in _PARAMETERS:
            node = _args(path, args, 2, 9)[0]
        elif path == _FROM_TYPE:
            function, _, inner, *_ = _args(path, args, 3, 4)
            node = Made(function, inner)
        elif path in _PLAIN:
            return _view(path, _args(path, args, *_PLAIN[path]))
        else:
            return _opaque(path, args)
    raise ValueError(f"a tensor is wrapped more than {_MAX_WRAPPERS} times")


def _opaque(path: str, args: Any) -> Opaque | None:
    module, _, name = path.rpartition(".")
    if not name.startswith("_rebuild_") or not module.startswith("torch."):
        return None
    kind = name.removeprefix("_rebuild_")
    if kind == "wrapper_subclass" and isinstance(args, tuple) and args and isinstance(args[0], Global):
        kind = args[0].name
    return Opaque(kind)


def _args(path: str, args: Any, least: int, most: int) -> tuple[Any, ...]:
    if not isinstance(args, tuple) or not least <= len(args) <= most:
        raise ValueError(f"a tensor is made by {path} from unusual arguments")
    return args


def _view(path: str, args: tuple[Any, ...]) -> View | Opaque:
    key, storage_type, count = _storage(args[0])
    dtype, metadata = storage_type, args[6] if len(args) > 6 else None
    if path.endswith("_v3"):
        dtype, metadata = _dtype(args[6]), args[7] if len(args) > 7 else None
    if isinstance(metadata, Table) and metadata.pairs:
        return Opaque("lazily negated or conjugated")
    offset, shape, strides = args[1], sizes_of(args[2]), sizes_of(args[3])
    if not is_size(offset) or len(shape) != len(strides):
        raise ValueError(f"a tensor over storage {key[:40]!r} has an unusual offset, shape or strides")
    view = View(key, count * storage_type.itemsize, dtype, offset, shape, strides)
    if view.end > view.nbytes:
        raise ValueError(f"a tensor reaches byte {view.end} of storage {key[:40]!r}, which has {view.nbytes} bytes")
    return view


def _storage(node: Any) -> tuple[str, torch.dtype, int]:
    words = node.key if isinstance(node, Persistent) else None
    if not isinstance(words, tuple) or len(words) != 5 or words[0] != "storage":
        raise ValueError("a tensor has no storage that torch knows")
    _, kind, key, _, count = words
    dtype = _STORAGES.get(kind.path) if isinstance(kind, Global) else None
    if not isinstance(key, str) or not is_size(count) or dtype is None:
        raise ValueError(f"a tensor has a storage of an unknown kind: {getattr(kind, 'path', '')[:60]!r}")
    return key, dtype, count


def _dtype(node: Any) -> torch.dtype:
    dtype = DTYPES.get(node.path) if isinstance(node, Global) else None
    if dtype is None:
        raise ValueError(f"a tensor has a type that cannot be read: {getattr(node, 'path', '')[:60]!r}")
    return dtype


def is_size(value: object) -> bool:
    r"""Whether something is a whole number from 0 to 2**63 - 1; ``True`` is not.

    Args:
        value: anything.

    Returns:
        The answer.
    """
    return type(value) is int and 0 <= value < 1 << 63


def sizes_of(node: Any) -> tuple[int, ...]:
    r"""Understand a pickled object as a shape, as strides or as offsets.

    Args:
        node: a tuple of whole numbers, or a ``torch.Size`` of one.

    Returns:
        The numbers.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(node, Made) and node.path == "torch.Size" and isinstance(node.args, tuple) and len(node.args) == 1:
        node = node.args[0]
    if not isinstance(node, tuple | list) or not all(map(is_size, node)):
        raise ValueError("a tensor's shape, strides or position are not whole numbers from 0 to 2**63 - 1")
    if len(node) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor has {len(node)} dimensions, at most {MAX_DIMENSIONS} are read")
    return tuple(node)
