# SPDX-License-Identifier: Apache-2.0
"""Killed, interrupted, out of space, source gone: the destination is absent or complete, the input untouched."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from pss_param.cli.main import run
from safetensors.torch import save_file

from pss_param.errors import CheckpointError
from pss_param.options import RepairOptions
from pss_param.repair import default_output, repair_checkpoint
from pss_param.verification import verify_checkpoint

# Every write of the repair goes through these; the child kills itself after a given number of written bytes.
KILLER = """
import json, os, signal, sys
import torch
from pss_param.checkpoint import transfer
from pss_param.options import RepairOptions
from pss_param.repair import repair_checkpoint

transfer.BLOCK = 1 << 12  # many small steps: every point can be met
source, points = sys.argv[1], json.loads(sys.argv[2])
options = RepairOptions(device="cpu")
written, limit = 0, -1

def wrap(name, size):
    real = getattr(os, name)
    def counted(*args):
        global written
        done = real(*args)
        written += size(args, done)
        if 0 <= limit <= written:
            os.kill(os.getpid(), signal.SIGKILL)
        return done
    setattr(os, name, counted)

wrap("pwrite", lambda args, done: done)
wrap("copy_file_range", lambda args, done: done)

def attempt(point):
    global limit, written
    child = os.fork()
    if child == 0:
        limit, written = point, 0
        repair_checkpoint(source, options=options, force=True)
        if point < 0:
            print("total", written, flush=True)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(point, status, json.dumps(sorted(os.listdir(os.path.dirname(source)))), flush=True)

for point in points:
    attempt(point)
"""


DIGITS = 24


def sick(seed, m=96, n=48):
    source = torch.Generator().manual_seed(seed)
    u, v = torch.randn(m, 1, generator=source), torch.randn(1, n, generator=source)
    return torch.randn(m, n, generator=source) / n**0.5 + 10 * u @ v / (u.norm() * v.norm())


def shard(first):
    return {f"model.layers.{i}.mlp.up_proj.weight": sick(i) for i in range(first, first + 3)}


def make(folder, kind):
    if kind == "file":
        save_file(shard(0) | shard(3), folder / "x.safetensors")
        return folder / "x.safetensors"
    path = folder / "x"
    (path / "sub").mkdir(parents=True)
    save_file(shard(0), path / "a.safetensors")
    save_file(shard(3), path / "b.safetensors")
    weight_map = dict.fromkeys(shard(0), "a.safetensors") | dict.fromkeys(shard(3), "b.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "sub" / "state.bin").write_bytes(os.urandom(50_000))
    return path


def content(path):
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [(p.name, hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in files]


def killed_at(source, points):
    command = [sys.executable, "-c", KILLER, str(source), json.dumps(points)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=True)
    return [line.split(" ", 2) for line in done.stdout.splitlines()]


def survives(folder, kind, count):
    folder.mkdir()
    source = make(folder, kind)
    before = content(source)
    total = int(next(row[1] for row in killed_at(source, [-1]) if row[0] == "total"))
    expected = content(default_output(source))
    for name in os.listdir(folder):
        path = folder / name
        if path != source:
            subprocess.run(["rm", "-r", str(path)], check=True)
    clean = sorted(os.listdir(folder))
    # The last bytes of all are those of the report, which is written before anything gets its name. The seconds that it
    # tells have more digits or fewer in another run, so the last point lies so many bytes before its end.
    points = [1 + i * (total - 2 - DIGITS) // (count - 1) for i in range(count)]
    mid_write = 0
    for point, status, names in killed_at(source, points):
        left = json.loads(names)
        assert status == "-9", point
        assert not [name for name in left if name not in clean and ".pss-tmp-" not in name], point
        assert len([name for name in left if ".pss-tmp-" in name]) <= 2, point  # none of earlier runs
        mid_write += any(".pss-tmp-" in name for name in left)
    assert mid_write >= 0.75 * count
    assert content(source) == before
    repair_checkpoint(source, options=RepairOptions(device="cpu"))
    assert sorted(os.listdir(folder)) == sorted(
        [*clean, default_output(source).name, default_output(source).name + ".pss.json"]
    )  # fmt: skip
    assert [row[:2] for row in content(default_output(source))] == [row[:2] for row in expected]
    assert not verify_checkpoint(default_output(source), source).problems


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_killed_at_20_points_of_the_bytes_written(tmp_path, kind):
    survives(tmp_path / "here", kind, 20)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_killed_at_200_points_of_the_bytes_written(tmp_path, kind):
    survives(tmp_path / "here", kind, 200)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_full_disk(tmp_path, kind, capsys):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        source = make(tmp_path, kind)
        assert run([str(source), "-o", str(small / "out")]) == 1
        err = capsys.readouterr().err
        assert "free space there" in err
        assert err.count("\n") == 1
        assert os.listdir(small) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_destination_that_cannot_be_written(tmp_path, kind, capsys, monkeypatch):
    source = make(tmp_path, kind)
    if os.geteuid() == 0:
        where = "/proc/out"  # root may write anywhere but here
    else:
        (tmp_path / "locked").mkdir(mode=0o500)
        where = str(tmp_path / "locked" / "out")
    assert run([str(source), "-o", where]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_source_that_vanishes(tmp_path, kind):
    source = make(tmp_path, kind)

    def vanish(step):
        if step.stage == "repair" and source.exists():
            os.rename(source, tmp_path / "elsewhere")

    with pytest.raises(CheckpointError, match="vanished"):
        repair_checkpoint(source, progress=vanish)
    assert os.listdir(tmp_path) == ["elsewhere"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_control_c(tmp_path, kind):
    source = make(tmp_path, kind)
    names = sorted(os.listdir(tmp_path))
    slow = (
        # A shell starts its background jobs with the signal ignored, and children inherit that.
        "import signal, sys, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pss_param.checkpoint import streaming\nfrom pss_param.cli import main\n"
        "real = streaming.write_all\n"
        "def slow(*args):\n    real(*args)\n    time.sleep(20)\n"
        "streaming.write_all = slow\nmain(sys.argv[1:])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, str(source)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not any(".pss-tmp-" in name for name in os.listdir(tmp_path)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err.count("\n") == 1
    assert "interrupted" in err
    assert sorted(os.listdir(tmp_path)) == names


@pytest.mark.parametrize("where", ["untouched", "repaired"])
def test_the_check_finds_what_the_disk_changed(tmp_path, monkeypatch, where):
    source = make(tmp_path, "file")
    name = "model.layers.{}.mlp.up_proj.weight".format(0 if where == "repaired" else 5)
    options = RepairOptions(exclude=("model.layers.5.*",))
    from pss_param.checkpoint import Editor

    real = Editor.finish

    def faulty(self, *args):
        (chunk,) = self.layout.tensors[name].chunks
        os.pwrite(self._fd(chunk.file), b"\x01\x02\x03", chunk.offset + 100)
        real(self, *args)

    monkeypatch.setattr(Editor, "finish", faulty)
    with pytest.raises(CheckpointError, match="differs from the source" if where == "untouched" else "read back"):
        repair_checkpoint(source, options=options)
    assert os.listdir(tmp_path) == ["x.safetensors"]
    report = repair_checkpoint(source, options=RepairOptions(exclude=("model.layers.5.*",), verify=False))
    found = verify_checkpoint(report.output, source)
    assert len(found.problems) >= 1


def test_the_look_in_passing_sees_what_a_look_of_its_own_sees(tmp_path):
    from pss_param.checkpoint import open_checkpoint
    from pss_param.checkpoint.streaming import Streamer, pieces
    from pss_param.finite import count_nonfinite

    tensors = {f"t{i}": torch.randn(3 + i, 70_000) for i in range(4)} | {"half": torch.ones(5, dtype=torch.float16)}
    tensors["t2"][1, 5], tensors["t2"][4, -1], tensors["half"][0] = float("nan"), float("inf"), -float("inf")
    save_file(tensors | {"ids": torch.arange(9)}, tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path / "x.safetensors") as layout, (tmp_path / "copy").open("w+b") as copy:
        spans = [(piece.begin, piece.end) for piece in pieces(layout, "x.safetensors")]
        assert spans[0][0] == 0
        assert [end for _, end in spans[:-1]] == [begin for begin, _ in spans[1:]]
        steps = []
        streamer = Streamer(layout, True, steps.append)
        assert streamer.copy("x.safetensors", copy.fileno()) is None
        assert sum(steps) == spans[-1][1] == (tmp_path / "x.safetensors").stat().st_size
        assert streamer.counts == {name: count_nonfinite(layout.blocks(name)) for name in tensors}
        assert (streamer.counts["t2"], streamer.counts["half"]) == (2, 1)
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "x.safetensors").read_bytes()
