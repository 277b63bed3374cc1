# SPDX-License-Identifier: Apache-2.0
r"""A changed copy of a checkpoint: copy all bytes, patch some tensors, finish, publish at once."""

import stat
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from torch import Tensor

from pss_param.errors import CheckpointError

from .layout import Layout, store
from .transfer import copy_range
from .write import StagedFile, check_not_source

Advance = Callable[[int], None]
"""Called with a number of bytes that are done."""


class Editor:
    r"""Builds a changed copy of a checkpoint of one file; a context manager.

    Leaving the context without :meth:`publish` leaves nothing behind.

    Args:
        layout: the open source; only its tensors' positions matter, not its format.
        destination: name of the copy.
        force: whether an existing destination may be replaced.

    Raises:
        CheckpointError: the destination is the source, or exists.
    """

    def __init__(self, layout: Layout, destination: Path, force: bool = False) -> None:
        r"""See the class."""
        check_not_source(destination, layout.path)
        self.layout = layout
        (self.file,) = layout.files
        self.patched: list[tuple[int, int]] = []
        mode = stat.S_IMODE(layout.stat(self.file).st_mode)
        self._staged = StagedFile(destination, mode, force)

    def __enter__(self) -> "Editor":
        r"""Begin the copy.

        Returns:
            The editor itself.
        """
        self._staged.__enter__()
        return self

    def copy(self, advance: Advance) -> None:
        r"""Take the disk space and copy the whole source.

        Args:
            advance: told of every step's bytes.
        """
        size = self.layout.stat(self.file).st_size
        self._staged.reserve(size)
        for step in copy_range(self.layout.fd(self.file), self._staged.fd, 0, size):
            advance(step)

    def write(self, name: str, value: Tensor) -> None:
        r"""Replace one tensor in the copy.

        Args:
            name: its key.
            value: of the stored shape and dtype, on the CPU.

        Raises:
            CheckpointError: shape or dtype differ from what is stored.
        """
        stored = self.layout.tensors[name]
        if tuple(value.shape) != stored.shape or value.dtype != stored.dtype:
            raise CheckpointError(
                f"{self.layout.path}: {name} is stored as {stored.dtype} {stored.shape}, "
                f"not as {value.dtype} {tuple(value.shape)}"
            )
        for chunk in stored.chunks:
            self.patched.append(store(self._staged.fd, chunk, value))

    def finish(self) -> None:
        r"""Mend check sums, make sure that the source stood still, and bring the copy to the disk."""
        self.layout.mend(self.file, self._staged.fd, self.patched)
        self.layout.check_unchanged()
        self._staged.flush()

    def publish(self) -> None:
        r"""Give the finished copy its name."""
        self._staged.publish()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        r"""Remove what was not published."""
        self._staged.__exit__(kind, error, trace)
