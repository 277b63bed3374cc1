# SPDX-License-Identifier: Apache-2.0
r"""A changed copy of a checkpoint: copy all bytes, patch some tensors, finish, publish at once."""

import stat
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from torch import Tensor

from pss_param.errors import CheckpointError

from .checking import first_damage, first_difference, untouched
from .layout import Layout
from .staged import StagedFolder, check_apart
from .stored import load, store
from .streaming import Advance, Streamer
from .transfer import tensor_bytes
from .write import StagedFile, check_not_source, no_space


class Editor:
    r"""Builds a changed copy of a checkpoint, a file or a folder; a context manager.

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
        self.patched: dict[str, list[tuple[int, int]]] = {}
        self._sums: dict[str, int] = {}
        self._blocks: Mapping[str, Sequence[int]] = {}
        self._staged = _stage(layout, destination, force)

    def __enter__(self) -> "Editor":
        r"""Begin the copy.

        Returns:
            The editor itself.
        """
        self._staged.__enter__()
        return self

    def _fd(self, file: str) -> int:
        return self._staged.fd(file) if isinstance(self._staged, StagedFolder) else self._staged.fd

    def copy(self, advance: Advance, verify: bool = True, changing: Collection[str] = ()) -> Mapping[str, int]:
        r"""Take the disk space and copy all files of the source.

        Args:
            advance: told of every step's bytes.
            verify: whether the copy is to be checked; see Note [One look while it is at hand].
            changing: names of the tensors that are likely to be changed, so that work is saved; others may be, too.

        Returns:
            Number of NaN and infinite elements by tensor name, of the tensors that could be counted in passing.

        Raises:
            CheckpointError: the disk is full, or does not give back what was written.
        """
        sizes = {file: self.layout.stat(file).st_size for file in self.layout.files}
        if isinstance(self._staged, StagedFolder):
            self._staged.reserve(sizes)
        else:
            self._staged.reserve(sum(sizes.values()))
        streamer = Streamer(self.layout, verify, advance, frozenset(changing))
        with no_space(self._staged.destination.parent, sum(sizes.values())):
            for file in sizes:
                self._refuse_difference(file, streamer.copy(file, self._fd(file)))
        self._blocks = streamer.sums
        return streamer.counts

    @property
    def unchecked_bytes(self) -> int:
        r"""Size of the files that :meth:`finish` has to read again."""
        return sum(self.layout.stat(file).st_size for file in {*self.patched, *self._blocks})

    def _refuse_difference(self, file: str, at: int | None) -> None:
        if at is not None:
            raise CheckpointError(
                f"{self._staged.destination}: byte {at} of {file} in the copy differs from the source although "
                "nothing was to change there; the disk or the memory is faulty, or something else wrote to it"
            )

    def write(self, name: str, value: Tensor) -> None:
        r"""Replace one tensor in the copy.

        Args:
            name: its key.
            value: of the stored shape and dtype, on the CPU.

        Raises:
            CheckpointError: shape or dtype differ from what is stored.
        """
        stored = self.layout.find(name)
        if tuple(value.shape) != stored.shape or value.dtype != stored.dtype:
            raise CheckpointError(
                f"{self.layout.path}: {name} is stored as {stored.dtype} {stored.shape}, "
                f"not as {value.dtype} {tuple(value.shape)}"
            )
        for chunk in stored.chunks:
            patch = store(self._fd(chunk.file), chunk, value)
            self.patched.setdefault(chunk.file, []).append(patch)
        self._sums[name] = _sum(value)

    def finish(self, verify: bool = True, advance: Advance | None = None) -> None:
        r"""Mend check sums, make sure that the source stood still, and bring the copy to the disk.

        Args:
            verify: whether to read the changed files of the copy again.
            advance: told of every step's bytes of that comparison.
        """
        for file, patches in self.patched.items():
            self.layout.mend(file, self._fd(file), patches)
        if verify:
            self._verify(advance or (lambda step: None))
        self.layout.check_unchanged()
        self._staged.flush()

    def _verify(self, advance: Advance) -> None:
        for file in sorted({*self.patched, *self._blocks}):
            patched = self.patched.get(file, [])
            patches = [*patched, *self.layout.mended(file, patched)] if patched else []
            if file in self._blocks:
                at = first_damage(self.layout, file, self._fd(file), self._blocks[file], patches, advance)
            else:  # it was compared as it was copied, but nobody knew that it would be changed
                spans = untouched(self.layout.stat(file).st_size, patches)
                at = first_difference(self.layout.fd(file), self._fd(file), spans, advance)
            self._refuse_difference(file, at)
        for name, expected in self._sums.items():
            stored = self.layout.find(name)
            if _sum(load(stored, self._fd)) != expected:
                raise CheckpointError(
                    f"{self._staged.destination}: {name} does not read back as it was written; "
                    "the disk or the memory is faulty, or another tensor lies over it"
                )

    def check_free(self) -> None:
        r"""Make sure once more that the destination may be written; it may have appeared meanwhile."""
        self._staged.check_free()

    def publish(self) -> None:
        r"""Give the finished copy its name."""
        self._staged.publish()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        r"""Remove what was not published."""
        self._staged.__exit__(kind, error, trace)


def _stage(layout: Layout, destination: Path, force: bool) -> StagedFile | StagedFolder:
    modes = {file: stat.S_IMODE(layout.stat(file).st_mode) for file in layout.files}
    if not layout.path.is_dir():
        (mode,) = modes.values()
        return StagedFile(destination, mode, force)
    check_apart(destination, layout.path)
    folders = {name: stat.S_IMODE((layout.path / name).stat().st_mode) for name in ("", *layout.folders)}
    return StagedFolder(destination, modes, folders, force)


def _sum(value: Tensor) -> int:
    return zlib.crc32(tensor_bytes(value.contiguous())) if value.numel() else 0
