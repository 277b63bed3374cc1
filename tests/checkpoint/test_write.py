# SPDX-License-Identifier: Apache-2.0
"""Absent or complete: the atomic writer, kernel copies, and what killed runs leave."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from pss_param.checkpoint import StagedFile, transfer, write, write_file
from pss_param.checkpoint.staged import StagedFolder
from pss_param.errors import CheckpointError


def test_appears_only_when_published(tmp_path):
    path = tmp_path / "out"
    with StagedFile(path, mode=0o640) as staged:
        transfer.write_all(staged.fd, 0, b"content")
        assert not path.exists()
        assert os.stat(staged.temporary).st_mode & 0o777 == 0o600
        staged.publish()
        assert path.read_bytes() == b"content"
    assert os.listdir(tmp_path) == ["out"]
    assert path.stat().st_mode & 0o777 == 0o640


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), StagedFile(tmp_path / "out"):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_an_interrupt_right_after_the_file_is_there_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(fd):
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "lock", interrupted)
    with pytest.raises(KeyboardInterrupt), StagedFile(tmp_path / "out"):
        pytest.fail("must not be entered")
    assert os.listdir(tmp_path) == []


def test_existing_destinations(tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(CheckpointError, match="--force"):
        write_file(path, b"new")
    write_file(path, b"new", force=True)
    assert path.read_bytes() == b"new"
    with pytest.raises(CheckpointError, match="is a folder"):
        write_file(tmp_path, b"new", force=True)
    with pytest.raises(CheckpointError, match="create it first"):
        write_file(tmp_path / "none" / "out", b"new")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="--force"):
        write_file(tmp_path / "dangling", b"new")


def test_a_destination_that_appears_meanwhile_is_not_overwritten(tmp_path):
    path = tmp_path / "out"
    with StagedFile(path) as staged:
        path.write_bytes(b"someone else's")
        with pytest.raises(CheckpointError, match="exists"):
            staged.publish()
    assert path.read_bytes() == b"someone else's"
    assert os.listdir(tmp_path) == ["out"]


def test_left_overs_of_a_killed_run_are_removed_and_those_of_a_living_one_are_not(tmp_path):
    path = tmp_path / "out"
    script = (
        "import sys, time; from pathlib import Path; from pss_param.checkpoint import StagedFile\n"
        "with StagedFile(Path(sys.argv[1])) as staged:\n"
        "    print('ready', flush=True); time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "ready\n"
        (left,) = os.listdir(tmp_path)
        write.remove_leftovers(path)
        assert os.listdir(tmp_path) == [left]
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert os.listdir(tmp_path) == [left]
        write_file(path, b"done")
        assert os.listdir(tmp_path) == ["out"]
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


@pytest.mark.parametrize("kernel", [True, False])
def test_copies_ranges_with_and_without_the_kernel(tmp_path, monkeypatch, kernel):
    if not kernel:

        def unsupported(*args):
            raise OSError(errno.EXDEV, "cross-device")

        monkeypatch.setattr(os, "copy_file_range", unsupported)
    data = os.urandom(300_001)
    (tmp_path / "a").write_bytes(data)
    with (tmp_path / "a").open("rb") as source, (tmp_path / "b").open("w+b") as target:
        steps = list(transfer.copy_range(source.fileno(), target.fileno(), 1, 300_000, to=7))
    assert sum(steps) == 300_000
    assert (tmp_path / "b").read_bytes() == bytes(7) + data[1:]


def test_copying_from_a_short_file_is_our_error(tmp_path):
    (tmp_path / "a").write_bytes(b"123")
    with (
        (tmp_path / "a").open("rb") as source,
        (tmp_path / "b").open("w+b") as target,
        pytest.raises(CheckpointError, match="truncated"),
    ):
        list(transfer.copy_range(source.fileno(), target.fileno(), 0, 10))


def test_a_full_disk_is_known_before_any_work(tmp_path):
    with pytest.raises(CheckpointError, match="free space"), StagedFile(tmp_path / "out") as staged:
        staged.reserve(1 << 60)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO])
def test_a_folder_that_takes_nothing_is_named_and_not_the_temporary(tmp_path, monkeypatch, code):
    def refuse(path, *args):
        raise OSError(code, os.strerror(code), os.fspath(path))

    plain = code == errno.EIO
    staged = StagedFile(tmp_path / "out"), StagedFolder(tmp_path / "folder", {}, {})
    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "mkdir", refuse)
    for one in staged:
        with pytest.raises(OSError if plain else CheckpointError, match=os.strerror(code)) as caught, one:
            pass
        assert plain or write.MARK not in str(caught.value)
        assert str(tmp_path) in str(caught.value)
