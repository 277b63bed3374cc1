# SPDX-License-Identifier: Apache-2.0
"""The copy: every byte read once, every written byte read back once, and no page cache taken that was not held."""

import os

import pytest
import torch
from safetensors.torch import save_file

from pss_param.checkpoint import open_checkpoint
from pss_param.checkpoint.checking import first_damage
from pss_param.checkpoint.recycling import BEHIND, Recycler, is_cold
from pss_param.checkpoint.streaming import Streamer, blocks
from pss_param.options import RepairOptions
from pss_param.repair import repair_checkpoint

UP = "model.layers.{}.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    """Two shards of 4 MB; one matrix of the first will be repaired."""
    weights = {UP.format(i): torch.randn(1024, 512) for i in range(4)}
    weights[UP.format(0)] += 3.0
    path = tmp_path / "m"
    path.mkdir()
    for shard in range(2):
        names = [UP.format(i) for i in (2 * shard, 2 * shard + 1)]
        save_file({name: weights[name] for name in names}, path / f"model-{shard + 1:05}-of-00002.safetensors")
    table = {UP.format(i): f"model-{i // 2 + 1:05}-of-00002.safetensors" for i in range(4)}
    (path / "model.safetensors.index.json").write_text(f'{{"weight_map": {str(table).replace(chr(39), chr(34))}}}')
    return path


@pytest.mark.parametrize("verify", [True, False])
def test_every_byte_is_read_once_and_read_back_once(folder, monkeypatch, verify):
    moved = {"source": 0, "copy": 0}
    real = os.preadv

    def counted(fd, views, offset, *flags):
        done = real(fd, views, offset, *flags)
        moved["copy" if ".pss-tmp-" in os.readlink(f"/proc/self/fd/{fd}") else "source"] += done
        return done

    monkeypatch.setattr(os, "preadv", counted)
    options = RepairOptions(targets="none", include=(UP.format(0),), verify=verify)
    report = repair_checkpoint(folder, options=options)
    assert report.changed == (UP.format(0),)
    size, target = sum(path.stat().st_size for path in folder.iterdir()), 1024 * 512 * 4
    # What is repaired is read a second time to be repaired; headers are a few bytes.
    assert size + target <= moved["source"] < size + target + 20_000
    if verify:
        assert size <= moved["copy"] < size + 20_000
    else:
        assert moved["copy"] == 0


@pytest.mark.parametrize("at", ["first byte", "beside the patch", "last byte"])
def test_damage_outside_of_patches_is_found_and_inside_is_not(tmp_path, at):
    save_file({"a": torch.randn(400_000), "b": torch.randn(300_000)}, tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path / "x.safetensors") as layout, (tmp_path / "copy").open("w+b") as copy:
        streamer = Streamer(layout, True, lambda step: None, {"a"})
        assert streamer.copy("x.safetensors", copy.fileno()) is None
        sums, size = streamer.sums["x.safetensors"], layout.stat("x.safetensors").st_size
        assert len(sums) == len(list(blocks(layout, "x.safetensors"))) > 4
        start = layout.tensors["a"].chunks[0].offset + 700_001  # in the middle of a block
        patches = [(start, 5)]
        os.pwrite(copy.fileno(), b"patch", start)
        steps = []
        assert first_damage(layout, "x.safetensors", copy.fileno(), sums, patches, steps.append) is None
        assert sum(steps) == size - 5
        place = {"first byte": 0, "beside the patch": start + 5, "last byte": size - 1}[at]
        byte = os.pread(copy.fileno(), 1, place)[0]
        os.pwrite(copy.fileno(), bytes([byte ^ 1]), place)
        found = first_damage(layout, "x.safetensors", copy.fileno(), sums, patches, steps.append)
        assert found is not None
        assert found <= place < found + (1 << 19)


def test_pages_are_given_back_only_where_nobody_held_them(tmp_path):
    path, size = tmp_path / "x", 3 * BEHIND
    with path.open("wb") as file:
        file.write(os.urandom(size))
        os.fsync(file.fileno())
    with path.open("rb", buffering=0) as file:
        fd = file.fileno()

        def read_all(keep):
            trail = Recycler(fd, size)
            for begin in range(0, size, 1 << 19):
                os.pread(fd, 1 << 19, begin)
                trail.passed(fd, begin, begin + (1 << 19), keep)
            trail.release(fd)
            return is_cold(fd, size)

        def forget():
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            return True

        assert not read_all(keep=False)  # just written, so it was there before
        forget()
        if not is_cold(fd, size):
            pytest.skip("this file system keeps all pages, or does not tell")
        # To ask is to make the kernel fetch some, which then were there before: so each try begins with forgetting.
        assert any(forget() and read_all(keep=False) for _ in range(5))
        forget()
        assert not read_all(keep=True)
