# SPDX-License-Identifier: Apache-2.0
r"""Files of ``torch.save``: a pickle that names the tensors, beside the raw bytes of their storages, in a zip.

State dicts (plain, or inside a trainer's dictionary) and Lightning's ``.ckpt``. The pickle is read for its
structure only, see :mod:`.pickled`.
"""

import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pss_param.errors import CheckpointError

from .archive import Record, mend_archive, read_archive, sums_of
from .layout import Layout
from .pickled import read_pickle
from .sharing import Sharing
from .stored import StoredTensor
from .torch_content import TensorPath, find_tensors, find_weights, is_lightning
from .torch_tensors import Opaque, View, tensor_of
from .transfer import read_exact

_LONGEST_KEY = 500
"""Characters of a key that the names of tensors show."""


@dataclass(frozen=True)
class TorchZip:
    r"""What a file of ``torch.save`` holds.

    Args:
        content: the pickled object, see :func:`.pickled.read_pickle`; nothing in it was ever called.
        folder: the archive's own folder, in front of all its records.
        records: the archive's records by name.
    """

    content: Any
    folder: str
    records: Mapping[str, Record]

    def record(self, view: View) -> Record:
        r"""Find the bytes of a tensor's storage.

        Args:
            view: the tensor.

        Returns:
            The record.

        Raises:
            ValueError: there is none, or it has another size.
        """
        found = self.records.get(f"{self.folder}/data/{view.storage}")
        if found is None:
            raise ValueError(f"a tensor lies in storage {view.storage[:40]!r}, which is not there")
        if found.size != view.nbytes:
            raise ValueError(f"storage {view.storage[:40]!r} has {found.size} bytes, its tensors expect {view.nbytes}")
        return found


def read_torch_zip(fd: int, start: int, size: int) -> TorchZip:
    r"""Read the structure of a file of ``torch.save``, or of one inside a larger file.

    Args:
        fd: the open file.
        start: its first byte.
        size: its bytes.

    Returns:
        The structure.

    Raises:
        ValueError: any rule is broken.
    """
    records = read_archive(fd, start, size)
    pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise ValueError("it is a zip archive, but not one of torch.save")
    folder = pickles[0].split("/")[0]
    if f"{folder}/constants.pkl" in records or any(name.startswith(f"{folder}/code/") for name in records):
        raise ValueError("it is a TorchScript program, not a checkpoint; save the model's state_dict with torch.save")
    order = records.get(f"{folder}/byteorder")
    if order is not None and bytes(read_exact(fd, order.offset, min(order.size, 16))) != b"little":
        raise ValueError("its numbers are big-endian; load it and save it again on a little-endian machine")
    pickled = records[pickles[0]]
    content = read_pickle(bytes(read_exact(fd, pickled.offset, pickled.size)))
    return TorchZip(content, folder, records)


@dataclass(frozen=True)
class TorchTensors:
    r"""The tensors of one file of ``torch.save``.

    Args:
        weights: those of the model's state dict, by its keys.
        prefix: the keys that lead to the state dict; empty where the file is one itself.
        state: every other tensor of the file (moments of optimizers, random states, ...), by dotted names such as
            ``"optimizer_states.0.state.3.exp_avg"``.
        paths: for every name in ``state`` the keys and positions that lead to it, such as
            ``("optimizer_states", 0, "state", 3, "exp_avg")``.
        zip: what else the file holds.
    """

    weights: Mapping[str, StoredTensor]
    prefix: tuple[str, ...]
    state: Mapping[str, StoredTensor]
    paths: Mapping[str, TensorPath]
    zip: TorchZip

    @property
    def lightning(self) -> bool:
        r"""Whether Lightning's trainer wrote it."""
        return is_lightning(self.zip.content)


def read_torch_file(fd: int, size: int, file: str, model: bool = True) -> TorchTensors:
    r"""Find all tensors of a file of ``torch.save``.

    Args:
        fd: the open file.
        size: its bytes.
        file: its relative name, for the tensors' chunks.
        model: whether it must hold a model's state dict; an ``optimizer.pt`` need not, then all its tensors are
            ``state``.

    Returns:
        The tensors. A :class:`ValueError` without the file's name says which rule is broken.
    """
    inside = read_torch_zip(fd, 0, size)
    prefix, nodes = find_weights(inside.content) if model else ((), {})
    views = {name: _view(node) for name, node in nodes.items()}
    paths = _names(found := find_tensors(inside.content, nodes), set(views))
    views |= {name: found[path] for name, path in paths.items()}
    placed = _place(inside, file, views)
    state = {name: placed[name] for name in paths}
    return TorchTensors({name: placed[name] for name in nodes}, prefix, state, paths, inside)


def _view(node: Any) -> View | Opaque:
    found = tensor_of(node)
    return Opaque("unknown") if found is None else found


def _names(found: Iterable[TensorPath], taken: set[str]) -> dict[str, TensorPath]:
    # ("a", "b.c") and ("a.b", "c") would have one name; so would keys that differ only where they are cut off.
    paths: dict[str, TensorPath] = {}
    last: dict[str, int] = {}
    for path in found:
        plain = name = _joined(path)
        while name in taken:
            last[plain] = last.get(plain, 1) + 1
            name = f"{plain}#{last[plain]}"
        taken.add(name)
        paths[name] = path
    return paths


def _joined(path: TensorPath) -> str:
    # A hostile key of a megabyte over a hundred thousand tensors would fill the memory with names.
    words = (str(word) for word in path)
    name = ".".join(word if len(word) <= _LONGEST_KEY else f"{word[:_LONGEST_KEY]}..." for word in words)
    return (name if len(name) <= 4 * _LONGEST_KEY else f"{name[:_LONGEST_KEY]}...{name[-_LONGEST_KEY:]}") or "tensor"


def parse_torch_zip(fd: int, file: str, path: Path | None = None) -> dict[str, StoredTensor]:
    r"""The weights of one file of ``torch.save``; for folders of several.

    Args:
        fd: the open file.
        file: its relative name, for the tensors' chunks.
        path: its full name, for messages; None for ``file``.

    Returns:
        The tensors of its state dict by their keys.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return dict(read_torch_file(fd, os.fstat(fd).st_size, file).weights)
    except ValueError as error:
        raise CheckpointError(f"{path or file} is not a usable torch file: {error}") from None


class TorchZipLayout(Layout):
    r"""A single file of ``torch.save``.

    Attributes:
        prefix: the keys that lead to the weights.
        paths: the keys that lead to each tensor of ``state``; see :class:`TorchTensors`.
        content: the pickled object, see :func:`.pickled.read_pickle`.

    Args:
        path: the file.

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "tiny.pt"
        >>> torch.save({"state_dict": {"w": torch.eye(2)}, "rng": torch.zeros(3)}, path)
        >>> with TorchZipLayout(path) as layout:
        ...     layout.prefix, layout.tensors["w"].shape, layout.read("w").sum().item(), list(layout.state)
        (('state_dict',), (2, 2), 2.0, ['rng'])
    """

    format = "torch"

    def __init__(self, path: Path) -> None:
        r"""See the class."""
        super().__init__(path, {path.name: path})
        self.prefix: tuple[str, ...] = ()
        self.paths: Mapping[str, TensorPath] = {}
        self.content: Any = None
        self._records: Mapping[str, Record] = {}

    def _parse(self) -> Mapping[str, StoredTensor]:
        file = self.path.name
        try:
            found = read_torch_file(self.fd(file), self.stat(file).st_size, file)
        except ValueError as error:
            raise CheckpointError(f"{self.path} is not a usable torch file: {error}") from None
        self.state, self.prefix, self.paths = found.state, found.prefix, found.paths
        self.content, self._records = found.zip.content, found.zip.records
        if found.lightning:
            self.format = "lightning"
        return found.weights

    def mend(self, file: str, fd: int, patched: Sequence[tuple[int, int]]) -> None:
        r"""Bring the zip's check sums up to date.

        Args:
            file: relative name of the file.
            fd: the copy, open for reading and writing.
            patched: ``(offset, count)`` of every patch, in bytes.
        """
        mend_archive(fd, self._records, patched)

    def mended(self, file: str, patched: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
        r"""Where the check sums of patched records are.

        Args:
            file: relative name of the file.
            patched: ``(offset, count)`` of every patch, in bytes.

        Returns:
            ``(offset, count)`` of every sum.
        """
        return sums_of(self._records, patched)


def _place(inside: TorchZip, file: str, found: Mapping[str, View | Opaque]) -> dict[str, StoredTensor]:
    plain = {name: view for name, view in found.items() if isinstance(view, View) and view.simple}
    sharing = Sharing(plain)
    return {
        name: _stored(inside, file, name, view, (file, sharing.group(name) if name in plain else name))
        for name, view in found.items()
    }


def _stored(inside: TorchZip, file: str, name: str, view: View | Opaque, storage: Hashable) -> StoredTensor:
    if isinstance(view, Opaque):
        return StoredTensor(name, None, view.kind, (), (), storage)
    record = inside.record(view)
    kind = str(view.dtype).removeprefix("torch.")
    if not view.simple:
        return StoredTensor(name, None, f"{kind} (expanded)", view.shape, (), storage)
    return StoredTensor(name, view.dtype, kind, view.shape, (view.chunk(file, record.offset),), storage)
