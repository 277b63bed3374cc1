# SPDX-License-Identifier: Apache-2.0
r"""What every checkpoint format looks like from outside: named tensors at known bytes of known files.

A format is one subclass of :class:`Layout` that fills in four facts: the ``files`` (all of them, also those
that hold no weight), the ``tensors`` with their byte positions, the ``config`` and, where bytes are protected
by check sums, how to ``mend`` them. Reading and patching follow from the positions and are the same for all
formats. Whatever is not a tensor is opaque and is copied as it is.
"""

import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from pss_param.errors import CheckpointError

from .stored import StoredTensor, load, load_chunk
from .transfer import LOOK, read_into, tensor_from

_L = TypeVar("_L", bound="Layout")

OPEN_FILES = 64
"""Source files that are held open at once; a checkpoint may have thousands, a process gets about a thousand."""


class Layout(ABC):
    r"""A checkpoint opened for reading; a context manager that holds its files open.

    Attributes:
        format: short name for reports, such as ``"safetensors"``.
        path: what the user named.
        files: every file by its relative name.
        folders: sub-folders by their relative names, empty ones too; nothing for a checkpoint of one file.
        tensors: every weight by its key, in the order of the checkpoint.
        state: tensors that are no weights (moments of an optimizer), by keys of their own.
        paths: keys and positions that lead to each tensor of ``state``, such as
            ``("optimizer.pt", "state", 3, "exp_avg")``.
        content: pickled objects around them, never unpickled, or None; in a folder by name of the file.
        config: the model's ``config.json``, if there is one.
        notes: what the user should know about how it was read, one sentence each.
    """

    format: str

    def __init__(self, path: Path, files: Mapping[str, Path]) -> None:
        r"""Open all files.

        Args:
            path: what the user named.
            files: every file by its relative name.
        """
        self.path = path
        self.files = dict(files)
        self.folders: tuple[str, ...] = ()
        self.config: Mapping[str, Any] | None = None
        self.notes: tuple[str, ...] = ()
        self.tensors: Mapping[str, StoredTensor] = {}
        self.state: Mapping[str, StoredTensor] = {}
        self.paths: Mapping[str, tuple[str | int, ...]] = {}
        self.content: Any = None
        self._open: OrderedDict[str, int] = OrderedDict()
        self._seen: dict[str, os.stat_result] = {}

    @abstractmethod
    def _parse(self) -> Mapping[str, StoredTensor]:
        r"""Find the tensors; called once, on entry, when :meth:`fd` works."""

    def mend(  # ruff: ignore[empty-method-without-abstract-decorator] - a format without check sums has nothing to do
        self, file: str, fd: int, patched: Sequence[tuple[int, int]]
    ) -> None:
        r"""Bring check sums of a copied and patched file up to date; formats without any do nothing.

        Args:
            file: relative name of the file.
            fd: the copy, open for reading and writing.
            patched: ``(offset, count)`` of every patch, in bytes.
        """

    def mended(self, file: str, patched: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
        r"""Where :meth:`mend` writes, so that a check of the copy can tell check sums from damage.

        Args:
            file: relative name of the file.
            patched: as for :meth:`mend`.

        Returns:
            ``(offset, count)`` of every check sum; nothing for a format without any.
        """
        return ()

    def fd(self, file: str) -> int:
        r"""The open source file of that name.

        Args:
            file: relative name.

        Returns:
            A file descriptor that stays owned by the layout, good until the next call.

        Raises:
            CheckpointError: the file has gone, or is another one than at first.
        """
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        if len(self._open) >= OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        try:
            # Never blocks on a pipe that has taken the place of a file.
            handle = os.open(self.files[file], os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise CheckpointError(f"{self.files[file]} has vanished; the checkpoint is incomplete") from None
        self._open[file] = handle
        now = os.fstat(handle)
        if not _same(self._seen.setdefault(file, now), now):
            raise self._changed(file)
        return handle

    def stat(self, file: str) -> os.stat_result:
        r"""What the source file was when it was opened first.

        Args:
            file: relative name.

        Returns:
            Size, mode and times.
        """
        if file not in self._seen:
            self.fd(file)
        return self._seen[file]

    def find(self, name: str) -> StoredTensor:
        r"""Look a tensor up among the weights, then among the state.

        Args:
            name: its key.

        Returns:
            The tensor.
        """
        return self.tensors[name] if name in self.tensors else self.state[name]

    def read(self, name: str) -> Tensor:
        r"""Read one tensor.

        Args:
            name: its key.

        Returns:
            A fresh contiguous CPU tensor of the stored dtype and shape.
        """
        self.dtype(name)
        return load(self.find(name), self.fd)

    def blocks(self, name: str) -> Iterator[Tensor]:
        r"""Go through a tensor's stored elements in small flat pieces, for checks that need no shape.

        Args:
            name: its key.

        Yields:
            Tensor: one-dimensional pieces, each valid until the next is asked for; elements in the gaps of a strided
                tensor are not among them.
        """
        dtype, buffer = self.dtype(name), bytearray(LOOK)
        for chunk in self.find(name).chunks:
            if not chunk.contiguous:
                yield (load_chunk(self.fd(chunk.file), chunk, dtype).as_strided(chunk.shape, chunk.strides).flatten())
                continue
            end = chunk.offset + chunk.span * dtype.itemsize
            for offset in range(chunk.offset, end, LOOK):
                count = min(LOOK, end - offset)
                read_into(self.fd(chunk.file), offset, memoryview(buffer)[:count])
                yield tensor_from(buffer, dtype)[: count // dtype.itemsize]

    def dtype(self, name: str) -> torch.dtype:
        r"""The torch type of a tensor.

        Args:
            name: its key.

        Returns:
            The type.

        Raises:
            CheckpointError: torch has no such type.
        """
        stored = self.find(name)
        if stored.dtype is None:
            raise CheckpointError(
                f"{self.path}: {name} has dtype {stored.dtype_name}, which torch cannot read; exclude it"
            )
        return stored.dtype

    def check_unchanged(self) -> None:
        r"""Make sure that nobody wrote to the source meanwhile, or removed it.

        Raises:
            CheckpointError: a file has gone, or differs in identity, size or time from when it was opened.
        """
        for file, before in self._seen.items():
            try:
                now = os.stat(self.files[file])
            except FileNotFoundError:
                raise CheckpointError(f"{self.files[file]} vanished while it was being read") from None
            if not _same(before, now):
                raise self._changed(file)

    def _changed(self, file: str) -> CheckpointError:
        return CheckpointError(
            f"{self.files[file]} changed while it was being read; "
            "wait until the training run has finished writing it and repeat the command"
        )

    def close(self) -> None:
        r"""Close all files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __enter__(self: _L) -> _L:
        r"""Find the tensors.

        Returns:
            The layout itself.
        """
        with ExitStack() as undo:
            undo.callback(self.close)
            self.tensors = self._parse()
            self._check_names()
            undo.pop_all()
        return self

    def _check_names(self) -> None:
        # They are shown in tables; in a terminal such a name could move the cursor, or could not be encoded at all.
        if odd := next((name for name in self.tensors if not name.isprintable()), None):
            raise CheckpointError(f"{self.path} has a tensor with unprintable characters in its name {odd!r}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        r"""Close all files."""
        self.close()


def _same(before: os.stat_result, now: os.stat_result) -> bool:
    return (before.st_dev, before.st_ino, before.st_size, before.st_mtime_ns) == (
        now.st_dev,
        now.st_ino,
        now.st_size,
        now.st_mtime_ns,
    )
