# SPDX-License-Identifier: Apache-2.0
"""The strict header parser, and reading through the layout."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from pss_param.checkpoint import open_checkpoint
from pss_param.checkpoint.safetensors import parse_header
from pss_param.errors import CheckpointError

TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]


def raw(header, buffer=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + buffer


def f32(begin, end, shape):
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_the_library_writes(tmp_path):
    tensors = {f"t{i}": (torch.randn(3, 5) * 4).to(dtype) for i, dtype in enumerate(TYPES)}
    tensors |= {
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        "fp8": torch.ones(4).to(torch.float8_e4m3fn),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "unicode": "ü"})
    with open_checkpoint(path) as layout:
        assert set(layout.tensors) == set(tensors)
        assert layout.header.metadata == {"format": "pt", "unicode": "ü"}
        for name, value in tensors.items():
            read = layout.read(name)
            assert read.dtype == value.dtype
            assert read.shape == value.shape
            assert torch.equal(read.reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))
            assert sum(block.numel() for block in layout.blocks(name)) == value.numel()


def test_tensor_order_is_the_headers_not_the_buffers(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw({"b": f32(4, 8, [1]), "a": f32(0, 4, [1])}, struct.pack("<2f", 1.0, 2.0)))
    with open_checkpoint(path) as layout:
        assert list(layout.tensors) == ["b", "a"]
        assert layout.read("b").tolist() == [2.0]


BROKEN = {
    "empty": (b"", "0 bytes"),
    "short length": (b"\1\0\0", "3 bytes"),
    "cut header": (raw({}, length=500), "cut off"),
    "giant header": (raw({}, length=1 << 40), "allows 100000000"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n", "git lfs pull"),
    "array": (raw(b"[1]"), "no JSON object"),
    "junk": (raw(b"{junk}"), "usable"),
    "not utf-8": (raw(b'{"\xff": 1}'), "UTF-8"),
    "deep": (raw(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "deep"),
    "duplicate": (raw(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":1}'), "twice"),
    "duplicate inside": (raw(b'{"a":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}'), "twice"),
    "nan": (raw(b'{"a": NaN}'), "NaN"),
    "metadata": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "extra field": (raw({"a": {**f32(0, 0, [0]), "x": 1}}), "exactly"),
    "dtype": (raw({"a": {"dtype": "F7", "shape": [0], "data_offsets": [0, 0]}}), "unknown dtype"),
    "dtype list": (raw({"a": {"dtype": [], "shape": [0], "data_offsets": [0, 0]}}), "unknown dtype"),
    "negative": (raw({"a": f32(0, 4, [-1])}, bytes(4)), "whole numbers"),
    "bool": (raw({"a": f32(0, 4, [True])}, bytes(4)), "whole numbers"),
    "float": (raw({"a": f32(0.0, 4, [1])}, bytes(4)), "whole numbers"),
    "overflow": (raw({"a": f32(0, 4, [1 << 62, 1 << 62])}, bytes(4)), "its offsets span"),
    "too big a number": (raw({"a": f32(0, 1 << 70, [1])}, bytes(4)), "whole numbers"),
    "dimensions": (raw({"a": f32(0, 4, [1] * 65)}, bytes(4)), "dimensions"),
    "three offsets": (raw({"a": {**f32(0, 4, [1]), "data_offsets": [0, 4, 8]}}, bytes(4)), "two offsets"),
    "backwards": (raw({"a": f32(4, 0, [1])}, bytes(4)), "span"),
    "wrong size": (raw({"a": f32(0, 8, [1])}, bytes(8)), "span"),
    "half a byte": (raw({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, bytes(1)), "12 bits"),
    "overlap": (raw({"a": f32(0, 8, [2]), "b": f32(4, 12, [2])}, bytes(12)), "overlaps"),
    "same bytes": (raw({"a": f32(0, 8, [2]), "b": f32(0, 8, [2])}, bytes(8)), "overlaps"),
    "hole": (raw({"a": f32(0, 4, [1]), "b": f32(8, 12, [1])}, bytes(12)), "hole"),
    "hole at start": (raw({"a": f32(4, 8, [1])}, bytes(8)), "hole"),
    "cut buffer": (raw({"a": f32(0, 8, [2])}, bytes(7)), "has 7 bytes"),
    "tail": (raw({"a": f32(0, 8, [2])}, bytes(9)), "has 9 bytes"),
    "zip": (b"PK\x03\x04" + bytes(60), "not a usable torch file"),
    "pickle": (b"\x80\x02}q\x00X\x01\x00\x00\x00a", "pickle"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_refuses_what_readers_would_disagree_about(tmp_path, case):
    content, reason = BROKEN[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as caught, open_checkpoint(path):
        pass
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_zero_size_tensors_may_lie_anywhere_between_others():
    entries = {"a": f32(0, 4, [1]), "z": f32(4, 4, [0, 7]), "b": f32(4, 8, [1])}
    assert list(parse_header(json.dumps(entries).encode(), 8).entries) == ["a", "z", "b"]


def test_a_file_that_shrinks_while_it_is_read_is_one_error(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.zeros(1000)}, path)
    with open_checkpoint(path) as layout:
        with path.open("r+b") as file:
            file.truncate(600)
        with pytest.raises(CheckpointError, match="too early"):
            layout.read("w")
        with pytest.raises(CheckpointError, match="changed while"):
            layout.check_unchanged()


def test_config_beside_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.zeros(1)}, path)
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    assert open_checkpoint(path).config == {"hidden_size": 4}
    for broken in ("[1]", "{", "[" * 100_000):
        (tmp_path / "config.json").write_text(broken)
        layout = open_checkpoint(path)
        assert layout.config is None
        assert "config.json" in layout.notes[0]


@pytest.mark.parametrize(("make", "reason"), [(lambda p: None, "not exist"), (lambda p: p.mkdir(), "no weights")])
def test_what_is_no_file(tmp_path, make, reason):
    make(tmp_path / "x")
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(tmp_path / "x")
