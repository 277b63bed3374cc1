# SPDX-License-Identifier: Apache-2.0
r"""A folder that appears under its own name only when it is complete."""

import ctypes
import errno
import os
import secrets
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from pss_param.errors import CheckpointError

from .layout import OPEN_FILES
from .transfer import reserve
from .write import (
    MARK,
    REPORT_SUFFIX,
    check_parent,
    creating_in,
    lock,
    no_space,
    remove_leftovers,
    remove_tree,
    sync_folder,
)

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class StagedFolder:
    r"""Builds a folder beside its destination and renames it once; a context manager.

    Leaving the context without :meth:`publish` removes the temporary folder.

    Args:
        destination: the name it will have.
        modes: permission bits of every file by relative name.
        folders: permission bits of every sub-folder by relative name, parents first, and of the folder itself
            under ``""``.
        force: whether an existing folder that this package wrote may be replaced.

    Raises:
        CheckpointError: the destination exists and may not be replaced.
    """

    def __init__(
        self, destination: Path, modes: Mapping[str, int], folders: Mapping[str, int], force: bool = False
    ) -> None:
        r"""See the class."""
        check_free_folder(destination, force)
        self.destination, self.modes, self.folders, self.force = destination, modes, folders, force
        self.temporary = destination.parent / f".{destination.name}{MARK}{secrets.token_hex(4)}"
        self._open: OrderedDict[str, int] = OrderedDict()
        self._held = -1

    def __enter__(self) -> "StagedFolder":
        r"""Take the temporary name and make the sub-folders.

        Returns:
            The staged folder itself.
        """
        check_parent(self.destination)
        remove_leftovers(self.destination)
        with ExitStack() as undo:
            undo.callback(self._discard)  # an interrupt may come as soon as the folder is there
            with creating_in(self.destination.parent):
                os.mkdir(self.temporary, 0o700)
            self._held = os.open(self.temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            lock(self._held)
            for folder in self.folders:
                if folder:
                    os.mkdir(self.temporary / folder, 0o700)
            undo.pop_all()
        return self

    def fd(self, file: str) -> int:
        r"""The staged file of that name, made when it is asked for first.

        Args:
            file: relative name.

        Returns:
            A file descriptor open for reading and writing, good until the next call.
        """
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        if len(self._open) >= OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._open[file] = os.open(self.temporary / file, flags, 0o600)
        return self._open[file]

    def reserve(self, sizes: Mapping[str, int]) -> None:
        r"""Take all disk space now, so that a full disk fails before any work is done.

        Args:
            sizes: final size in bytes of every file.
        """
        with no_space(self.destination.parent, sum(sizes.values())):
            for file, size in sizes.items():
                reserve(self.fd(file), size)

    def flush(self) -> None:
        r"""Set the modes and bring everything to the disk; whatever can still fail fails here."""
        for file, mode in self.modes.items():
            fd = self.fd(file)
            os.fchmod(fd, mode)
            os.fsync(fd)
        for folder, mode in reversed(list(self.folders.items())):
            fd = os.open(self.temporary / folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fchmod(fd, mode | 0o700)  # a folder that its owner cannot enter could not be renamed or removed
                os.fsync(fd)
            finally:
                os.close(fd)

    def publish(self) -> None:
        r"""Give the flushed folder its name.

        A destination that has appeared meanwhile raises :class:`CheckpointError` unless ``force`` is set.
        """
        self.check_free()
        if not os.path.lexists(self.destination):
            os.rename(self.temporary, self.destination)
            self._release()
        else:
            exchange(self.temporary, self.destination)
            self._discard()  # what lies under the temporary name now is the old folder
        sync_folder(self.destination.parent)

    def check_free(self) -> None:
        r"""Raise where the destination exists by now and may not be replaced."""
        check_free_folder(self.destination, self.force)

    def _release(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])
        if self._held >= 0:
            os.close(self._held)
            self._held = -1

    def _discard(self) -> None:
        if self.temporary.exists():
            remove_tree(self.temporary)
        self._release()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        r"""Remove what was not published."""
        if self._held >= 0:
            self._discard()


def check_free_folder(destination: Path, force: bool) -> None:
    r"""Make sure that a folder of that name may be written.

    Args:
        destination: the name.
        force: whether an existing folder may be replaced; only one that has a report beside it is.

    Raises:
        CheckpointError: it may not.
    """
    if not os.path.lexists(destination):
        return
    if not force:
        raise CheckpointError(f"{destination} exists; pass --force to replace it or another name with -o")
    if destination.is_symlink() or not destination.is_dir():
        raise CheckpointError(f"{destination} is no folder, the result is one; name another output with -o")
    ours = destination.with_name(destination.name + REPORT_SUFFIX).is_file()
    if not ours and any(os.scandir(destination)):
        raise CheckpointError(
            f"{destination} has no report {destination.name}{REPORT_SUFFIX} beside it, so pss-repair did not make it "
            "and --force will not remove it; remove it yourself or name another output with -o"
        )


def check_apart(destination: Path, source: Path) -> None:
    r"""Make sure that neither of two folders lies inside the other.

    Args:
        destination: where to write.
        source: the input.

    Raises:
        CheckpointError: one holds the other.
    """
    inner, outer = destination.resolve(), source.resolve()
    if outer in inner.parents or inner in outer.parents:
        raise CheckpointError(
            f"{destination} and the input {source} lie inside each other; name another output with -o"
        )


def exchange(one: Path, other: Path) -> None:
    r"""Swap two names at once where the kernel can, else in two steps.

    Args:
        one: an existing name.
        other: an existing name on the same file system.

    Raises:
        OSError: neither way works.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise OSError(code, os.strerror(code), os.fspath(other))
    aside = one.with_name(f"{one.name}-old")
    os.rename(other, aside)
    os.rename(one, other)
    os.rename(aside, one)


def parents_first(folders: Sequence[str]) -> list[str]:
    r"""Order sub-folders so that each comes after the one that holds it.

    Args:
        folders: relative names.

    Returns:
        The same names.

    Example:
        >>> parents_first(["a/b", "a"])
        ['a', 'a/b']
    """
    return sorted(folders, key=lambda name: (name.count("/"), name))
