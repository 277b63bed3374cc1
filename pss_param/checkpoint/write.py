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
import stat
from pathlib import Path
from types import TracebackType

from pss_param.errors import CheckpointError

from .transfer import reserve, write_all

MARK = ".pss-tmp-"


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

        Raises:
            CheckpointError: the destination's folder does not exist.
        """
        if not self.destination.parent.is_dir():
            raise CheckpointError(f"{self.destination.parent} is not a folder; create it first")
        remove_leftovers(self.destination)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        # A private checkpoint must not be readable by others while it is being built.
        self.fd = os.open(self.temporary, flags, 0o666 if self.mode is None else 0o600)
        _lock(self.fd)
        return self

    def reserve(self, size: int) -> None:
        r"""Take all disk space now, so that a full disk fails before any work is done.

        Args:
            size: final size in bytes.

        Raises:
            CheckpointError: there is not enough space.
            OSError: the file system refuses for another reason.
        """
        try:
            reserve(self.fd, size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise CheckpointError(
                f"{self.destination.parent} cannot take a file of {size:,} bytes ({error.strerror}); "
                "free space there or write elsewhere with -o"
            ) from None

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
        check_free(self.destination, self.force)
        os.replace(self.temporary, self.destination)
        self._close()
        sync_folder(self.destination.parent)

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
        if entry.name.startswith(prefix) and stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
            _remove_if_abandoned(Path(entry.path))


def _remove_if_abandoned(path: Path) -> None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except (FileNotFoundError, PermissionError):
        return  # its writer has just finished, or it is another user's: neither is ours to remove
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except OSError as error:
        # Held by a living writer, or a file system without locks: then nobody can tell, so it stays.
        if error.errno not in (errno.EWOULDBLOCK, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    finally:
        os.close(fd)


def _lock(fd: int) -> None:
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
