# SPDX-License-Identifier: Apache-2.0
"""The zip parser: agrees with zipfile on honest archives, refuses those that readers understand differently."""

import struct
import zipfile

import pytest
import torch
from torch_files import raw_zip

from pss_param.checkpoint.archive import checksum, mend_archive, read_archive, sums_of


def records_of(path, start=0):
    with path.open("rb") as file:
        return read_archive(file.fileno(), start, path.stat().st_size - start)


@pytest.mark.parametrize("before", [0, 1000])
def test_agrees_with_zipfile_on_torchs_archives(tmp_path, before):
    path, inner = tmp_path / "x.pt", tmp_path / "inner.pt"
    torch.save({"w": torch.randn(30, 7), "e": torch.zeros(0), "n": {"k": torch.arange(5)}}, inner)
    path.write_bytes(bytes(before) + inner.read_bytes())
    found = records_of(path, before)
    with zipfile.ZipFile(inner) as archive:
        assert list(found) == archive.namelist()
        for name, record in found.items():
            content = path.read_bytes()[record.offset : record.offset + record.size]
            assert content == archive.read(name)
            assert record.crc == archive.getinfo(name).CRC


def test_reads_what_zipfile_writes_stored(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"N.")
        with archive.open("x/big", "w", force_zip64=True) as file:
            file.write(b"abc")
    assert [(r.name, r.size) for r in records_of(path).values()] == [("x/data.pkl", 2), ("x/big", 3)]


def test_mends_only_what_was_patched(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.zeros(8), "b": torch.ones(8)}, path)
    before = records_of(path)
    target = before["x/data/1"]
    with path.open("r+b") as file:
        file.seek(target.offset + 4)
        file.write(b"abcd")
        file.flush()
        patch = [(target.offset + 4, 4), (before["x/version"].offset, 0)]
        assert mend_archive(file.fileno(), before, patch) == ("x/data/1",)
        assert sums_of(before, patch) == tuple((at, 4) for at in target.sums)
        assert checksum(file.fileno(), target.offset, target.size) != target.crc
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    after = records_of(path)
    assert {name for name in after if after[name] != before[name]} == {"x/data/1"}


GOOD = [("x/a", b"aaaa"), ("x/b", b"bbbbbb")]
PLAIN = raw_zip(GOOD)


def patched(data, at, text):
    at = at % len(data)
    return data[:at] + text + data[at + len(text) :]


TABLE = PLAIN.index(b"PK\1\2")
HOSTILE = {
    "empty": (b"", "cut off"),
    "cut": (PLAIN[:-1], "cut off"),
    "appended": (PLAIN + b"\0", "appended"),
    "comment": (patched(PLAIN, -2, b"\5\0") + b"hello", "appended"),
    "twice": (raw_zip([("x/a", b"1"), ("x/a", b"2")]), "twice"),
    "overlap": (raw_zip([("x/a", b"aaaa"), ("x/a", b"bbbb")], listed=["x/a", "x/b"], offsets=[0, 0]), "contradicts"),
    "renamed": (raw_zip(GOOD, listed=["x/a", "x/c"]), "contradicts"),
    "deflated": (raw_zip(GOOD, method=8), "compressed"),
    "encrypted": (raw_zip(GOOD, flags=1), "encrypted"),
    "offset outside": (raw_zip(GOOD, offsets=[0, 1 << 30]), "outside"),
    "size outside": (patched(PLAIN, TABLE + 20, struct.pack("<2L", 5000, 5000)), "outside"),
    "sizes differ": (patched(PLAIN, TABLE + 20, struct.pack("<2L", 4, 3)), "compressed"),
    "smaller in the list": (patched(PLAIN, TABLE + 20, struct.pack("<2L", 3, 3)), "contradicts"),
    "other sum in the list": (patched(PLAIN, TABLE + 16, b"abcd"), "contradicts"),
    "more records": (patched(PLAIN, -14, struct.pack("<2H", 3, 3)), "shorter"),
    "fewer records": (patched(PLAIN, -14, struct.pack("<2H", 1, 1)), "longer"),
    "parts": (patched(PLAIN, -14, struct.pack("<2H", 1, 2)), "parts"),
    "list elsewhere": (patched(PLAIN, -6, struct.pack("<L", 3)), "should end"),
    "list of a giant": (patched(PLAIN, -10, struct.pack("<L", 0xFFFFFFF0)), "should end"),
    "64-bit size missing": (patched(PLAIN, TABLE + 20, b"\xff" * 8), "64-bit size"),
    "bad mark": (patched(PLAIN, TABLE, b"XX"), "broken"),
    "name not utf-8": (patched(PLAIN, TABLE + 46, b"\xff"), "UTF-8"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_refuses_archives_that_readers_understand_differently(tmp_path, name):
    data, reason = HOSTILE[name]
    path = tmp_path / "x.pt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=reason):
        records_of(path)


def test_refuses_a_record_inside_another(tmp_path):
    inner = raw_zip([("x/b", b"bb")])[: 30 + 3 + 2]
    path = tmp_path / "x.pt"
    # The list names the second record, which lies in the first one's content.
    path.write_bytes(raw_zip([("x/a", inner), ("x/b", b"bb")], offsets=[0, 33]))
    with pytest.raises(ValueError, match="overlap"):
        records_of(path)


def test_a_descriptor_that_lies_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(8)}, path)
    good = records_of(path)["x/data/0"]
    data = path.read_bytes()
    path.write_bytes(patched(data, good.sums[1], b"\1\2\3\4"))
    with pytest.raises(ValueError, match="descriptor"):
        records_of(path)


@pytest.mark.slow
def test_records_over_4_gib(tmp_path):
    path = tmp_path / "big.pt"
    torch.save({"a": torch.ones(3), "big": torch.zeros((1 << 32) + 5, dtype=torch.uint8), "z": torch.ones(4)}, path)
    found = records_of(path)
    with zipfile.ZipFile(path) as archive:
        assert {name: r.size for name, r in found.items()} == {i.filename: i.file_size for i in archive.infolist()}
    for name in ("big/data/1", "big/data/2"):
        with path.open("r+b") as file:
            file.seek(found[name].offset)
            file.write(b"\7")
            file.flush()
            assert mend_archive(file.fileno(), found, [(found[name].offset, 1)]) == (name,)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert torch.load(path, weights_only=True, mmap=True)["big"][0] == 7
