# SPDX-License-Identifier: Apache-2.0
r"""Writing so that a destination is either absent (or as it was) or complete, whatever happens in between.

A file is built under a temporary name in the destination's folder, flushed, renamed, and the folder is
flushed.
"""

# Note [Left-over temporaries]
# A killed run cannot clean up. Every temporary is held under an exclusive flock while its writer lives, and
# the kernel drops the lock with the process, so the next run for the same destination takes the lock of an
# abandoned temporary, removes it, and leaves alone one that another process is still filling. Process ids
# would not do: they are reused, and differ between the machines of a shared folder.

import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from pss_param.errors import CheckpointError

from .transfer import reserve, write_all

MARK = ".pss-tmp-"
REPORT_SUFFIX = ".pss.json"
"""What the name of a report adds to the name of the checkpoint that it tells of."""


class StagedFile:
    r"""A file that appears under its own name only when it is complete; a context manager.

    Leaving the context without :meth:`publish` removes the temporary.

    Args:
        destination: the name it will have.
        mode: permission bits; None for what a new file gets.
        force: whether an existing destination may be replaced.

    Raises:
        CheckpointError: the destination exists and ``force`` is False, or it is a folder.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "out"
        >>> with StagedFile(path) as staged:
        ...     write_all(staged.fd, 0, b"done")
        ...     before = path.exists()
        ...     staged.publish()
        >>> before, path.read_bytes()
        (False, b'done')
    """

    def __init__(self, destination: Path, mode: int | None = None, force: bool = False) -> None:
        r"""See the class."""
        check_free(destination, force)
        self.destination, self.mode, self.force = destination, mode, force
        self.temporary = destination.parent / f".{destination.name}{MARK}{secrets.token_hex(4)}"
        self.fd = -1

    def __enter__(self) -> "StagedFile":
        r"""Take the temporary name.

        Returns:
            The staged file itself, with ``fd`` open.
        """
        check_parent(self.destination)
        remove_leftovers(self.destination)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        entered = False
        try:
            with creating_in(self.destination.parent):
                # A private checkpoint must not be readable by others while it is being built.
                self.fd = os.open(self.temporary, flags, 0o666 if self.mode is None else 0o600)
            lock(self.fd)
            entered = True
        finally:
            if not entered:  # an interrupt may come as soon as the file is there
                self.temporary.unlink(missing_ok=True)
        return self

    def reserve(self, size: int) -> None:
        r"""Take all disk space now, so that a full disk fails before any work is done.

        Args:
            size: final size in bytes.
        """
        with no_space(self.destination.parent, size):
            reserve(self.fd, size)

    def flush(self) -> None:
        r"""Set the mode and bring everything to the disk; whatever can still fail fails here."""
        if self.mode is not None:
            os.fchmod(self.fd, self.mode)
        os.fsync(self.fd)

    def publish(self) -> None:
        r"""Flush everything and give the file its name.

        A destination that has appeared meanwhile raises :class:`CheckpointError` unless ``force`` is set.
        """
        self.flush()
        self.check_free()
        os.replace(self.temporary, self.destination)
        self._close()
        sync_folder(self.destination.parent)

    def check_free(self) -> None:
        r"""Raise where the destination exists by now and may not be replaced."""
        check_free(self.destination, self.force)

    def _close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        r"""Remove what was not published."""
        if self.fd >= 0:
            self.temporary.unlink(missing_ok=True)
            self._close()


def write_file(destination: Path, data: bytes, force: bool = False) -> None:
    r"""Write a small file at once, atomically.

    Args:
        destination: its name.
        data: its content.
        force: whether an existing one may be replaced.
    """
    with StagedFile(destination, force=force) as staged:
        write_all(staged.fd, 0, data)
        staged.publish()


def check_free(destination: Path, force: bool) -> None:
    r"""Make sure that a name may be written to.

    Args:
        destination: the name.
        force: whether an existing file may be replaced.

    Raises:
        CheckpointError: it may not.
    """
    if destination.is_dir():
        raise CheckpointError(f"{destination} is a folder; name a file with -o")
    if os.path.lexists(destination) and not force:
        raise CheckpointError(f"{destination} exists; pass --force to replace it or another name with -o")


def check_not_source(destination: Path, source: Path) -> None:
    r"""Make sure that the input is never the output, under any name.

    Args:
        destination: where to write.
        source: the input.

    Raises:
        CheckpointError: both are the same file or folder.
    """
    if destination.exists() and destination.samefile(source):
        raise CheckpointError(f"{destination} is the input itself, which is never changed; name another output with -o")


def remove_leftovers(destination: Path) -> None:
    r"""Remove what killed runs left for this destination. See Note [Left-over temporaries].

    Args:
        destination: the name they were to get.
    """
    prefix = f".{destination.name}{MARK}"
    for entry in list(os.scandir(destination.parent)):
        if entry.name.startswith(prefix):
            _remove_if_abandoned(Path(entry.path))


def _remove_if_abandoned(path: Path) -> None:
    try:
        kind = stat.S_IFMT(os.lstat(path).st_mode)
        if kind not in (stat.S_IFREG, stat.S_IFDIR):
            return
        flags = os.O_RDONLY if kind == stat.S_IFDIR else os.O_RDWR
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
    except (FileNotFoundError, PermissionError):
        return  # its writer has just finished, or it is another user's: neither is ours to remove
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if kind == stat.S_IFDIR:
            remove_tree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        # Held by a living writer, or a file system without locks: then nobody can tell, so it stays.
        if error.errno not in (errno.EWOULDBLOCK, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    finally:
        os.close(fd)


def remove_tree(folder: Path) -> None:
    r"""Remove a folder of ours and all in it, also where its sub-folders are read-only already.

    Args:
        folder: the folder.
    """
    for root, _, _ in os.walk(folder):
        os.chmod(root, 0o700)
    shutil.rmtree(folder)


def check_parent(destination: Path) -> None:
    r"""Make sure that the folder which will hold an output is there.

    Args:
        destination: the output.

    Raises:
        CheckpointError: it is not.
    """
    if not destination.parent.is_dir():
        raise CheckpointError(f"{destination.parent} is not a folder; create it first")


@contextmanager
def creating_in(folder: Path) -> Generator[None, None, None]:
    r"""Turn the system's refusal of a temporary, whose name tells nobody anything, into a sentence about its folder.

    Args:
        folder: where it is to be made.

    Yields:
        None: nothing.

    Raises:
        CheckpointError: the folder may not be written to.
        OSError: the file system refuses for another reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise CheckpointError(
            f"nothing can be created in {folder} ({error.strerror}); get the right to write there or write elsewhere "
            "with -o"
        ) from None


@contextmanager
def no_space(folder: Path, size: int) -> Generator[None, None, None]:
    r"""Turn the system's "no space" into a sentence that says what to do.

    Args:
        folder: where it is to be written.
        size: bytes that are needed.

    Yields:
        None: nothing.

    Raises:
        CheckpointError: there is not enough space.
        OSError: the file system refuses for another reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise CheckpointError(
            f"{folder} cannot take {size:,} bytes ({error.strerror}); free space there or write elsewhere with -o"
        ) from None


def lock(fd: int) -> None:
    r"""Hold a temporary while its writer lives. See Note [Left-over temporaries].

    Args:
        fd: the temporary file or folder.

    Raises:
        OSError: it cannot be locked, on a file system that has locks.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise


def sync_folder(folder: Path) -> None:
    r"""Flush a folder, so that a rename in it survives a power cut.

    Args:
        folder: the folder.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
