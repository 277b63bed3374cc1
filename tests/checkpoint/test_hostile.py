# SPDX-License-Identifier: Apache-2.0
"""Files that are small and well formed but would keep a careless reader busy for hours, or fill the memory."""

import contextlib
import json
import pickle
import struct
import tempfile
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from fuzz_pickles import MARKER, OBJECTS, PAYLOADS, damage_pickle
from fuzz_seeds import UP, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch_files import raw_zip, sick, torch_like

from pss_param.checkpoint import pickled
from pss_param.checkpoint.archive import read_archive
from pss_param.checkpoint.dcp_metadata import read_metadata
from pss_param.checkpoint.pickled import MAX_SHARED, read_pickle
from pss_param.checkpoint.safetensors import parse_header
from pss_param.checkpoint.shards import parse_index
from pss_param.errors import CheckpointError, NonFiniteError
from pss_param.repair import repair_checkpoint
from pss_param.scan import scan_checkpoint


def refused_soon(path, match, seconds=20, peak=400 << 20):
    """Scanning ends in our error, in bounded time and memory; tracing makes it several times slower."""
    tracemalloc.start()
    start = time.monotonic()
    try:
        with pytest.raises(CheckpointError, match=match) as caught:
            scan_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < peak
    finally:
        tracemalloc.stop()
    assert time.monotonic() - start < seconds
    assert path.name in str(caught.value)


def text(word):
    return b"X" + struct.pack("<L", len(word)) + word.encode()


def tensor(key="0", count=4):
    kind = b"ctorch\nFloatStorage\n"
    storage = b"(" + text("storage") + kind + text(key) + text("cpu") + b"J" + struct.pack("<l", count) + b"tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0K\4\x85K\1\x85\x89)tR"


MATRIX = tensor().replace(b"K\4\x85K\1\x85", b"K\2K\2\x86K\2K\1\x86")


def many(number, value):
    """Items of a dictionary: numbered keys, all with the same value."""
    return b"".join(text(f"k{i}") + value for i in range(number))


def file_of(tmp_path, pickled):
    path = tmp_path / "bomb.pt"
    path.write_bytes(torch_like(pickled, [("0", b"\0" * 16)]))
    return path


SMALL = b"}(" + many(3000, tensor()) + b"u"
SHARED = {
    "one table under many keys": b"\x80\2}(" + text("t") + SMALL + b"q\1" + many(20_000, b"h\1") + b"u.",
    "filled after it was used": b"\x80\2}q\0(" + text("t") + b"}q\1" + many(20_000, b"h\1") + b"uh\1("
    + many(3000, b"K\1") + b"u0.",
    "in a slot used again": b"\x80\2}(" + text("t") + SMALL + b"q\1" + many(20_000, b"h\1") + text("z") + b"Nq\1u.",
    "doubled on the stack": b"\x80\2}(" + text("t") + SMALL + b"2" * 20_000 + b"l.",
    "as the arguments of an object": b"\x80\2}(" + text("t") + b"ccollections\nOrderedDict\n(](" + b"]" * 3000
    + b"etRq\1" + many(20_000, b"h\1") + b"u.",
}  # fmt: skip


@pytest.mark.parametrize("kind", SHARED)
def test_a_table_that_is_shared_thousands_of_times_is_refused(tmp_path, kind):
    assert len(SHARED[kind]) < 1 << 20
    refused_soon(file_of(tmp_path, SHARED[kind]), "so often")


def test_honest_sharing_passes():
    names = [f"model.layers.{i}.weight" for i in range(20_000)]
    state = {name: {"exp_avg": 1, "exp_avg_sq": 2, "owner": name} for name in names}
    assert len(read_pickle(pickle.dumps([state, names, names]))[1]) == 20_000
    assert MAX_SHARED > 20 * 20_000


def test_more_dictionaries_than_any_checkpoint_has_are_refused(monkeypatch):
    monkeypatch.setattr(pickled, "MAX_CALLS", 1000)
    assert len(read_pickle(b"(" + b"}" * 1000 + b"l.")) == 1000
    with pytest.raises(ValueError, match="more than 1000 objects"):
        read_pickle(b"(" + b"}" * 1001 + b"l.")


def test_long_keys_above_many_tensors_do_not_fill_the_memory(tmp_path):
    key = "k" * 1_000_000
    inner = b"](" + tensor() + b"q\1" + b"h\1" * 2000 + b"e"
    content = b"\x80\2}(" + text("state_dict") + b"}" + text("w") + tensor() + b"s" + text(key) + inner + b"u."
    tracemalloc.start()
    nothing_to_scan(file_of(tmp_path, content))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20


def nothing_to_scan(path):
    with pytest.raises(ValueError, match="selects no weight"):
        scan_checkpoint(path)


def test_names_that_collide_are_numbered_without_trying_all(tmp_path):
    # Keys of one megabyte in common are cut off to the same name.
    rows = b"".join(text("k" * 600 + f"{i}") + tensor() for i in range(3000))
    content = (
        b"\x80\2}(" + text("state_dict") + b"}" + text(UP) + tensor() + b"s" + text("rest") + b"}(" + rows + b"uu."
    )
    start = time.monotonic()
    nothing_to_scan(file_of(tmp_path, content))
    assert time.monotonic() - start < 10


NAMES = ["a\nb", "\x1b[2Jx", "\ud800", "x\0", "\u202egnp"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_a_terminal_would_obey_are_refused(tmp_path, name):
    head = json.dumps({name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head)
    with pytest.raises(CheckpointError, match="unprintable") as caught:
        scan_checkpoint(path)
    assert str(caught.value).isprintable()


def test_long_and_unprintable_words_are_shown_in_one_short_line(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    save_file({UP: sick(8, 8)}, folder / "m-00001-of-00001.safetensors")
    table = {UP: "m-00001-of-00001.safetensors", "n": "a\n\ud800" + "x" * 9000}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    with pytest.raises(CheckpointError, match="lacks 1 of the 2 shards") as caught:
        scan_checkpoint(folder)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2000
    assert str(caught.value).endswith("copy the checkpoint again")


def test_finite_values_whose_norm_exceeds_the_type_are_measured_in_a_wider_one(tmp_path):
    tensors = weights()
    tensors[UP][3, 3] = tensors[UP][5, 3] = 3e38
    save_file(tensors, tmp_path / "x.safetensors")
    report = scan_checkpoint(tmp_path / "x.safetensors")
    (row,) = (row for row in report.rows if row.name == UP)
    exact = torch.linalg.svdvals(tensors[UP].double())
    assert row.spectral_norm == pytest.approx(float(exact[0]), rel=1e-3)
    assert row.stable_rank == pytest.approx(float(exact.square().sum() / exact[0].square()), rel=1e-3)
    assert json.loads(report.to_json())
    done = repair_checkpoint(tmp_path / "x.safetensors")
    assert json.loads(done.to_json())
    save_file({UP: tensors[UP].double() * 5.9e269}, tmp_path / "y.safetensors")
    with pytest.raises(NonFiniteError, match=r"y\.safetensors: model"):
        repair_checkpoint(tmp_path / "y.safetensors")


def test_errors_of_the_choice_name_the_checkpoint(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors: .*selects no weight"):
        scan_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize("text", [b"[]," * (6 << 20), b"{}," * (6 << 20)])
def test_megabytes_of_empty_lists_are_refused_unread(tmp_path, text):
    body = b'{"weight_map": {"w": [' + text + b"1]}}"
    for name in ("model.safetensors.index.json", "config.json"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        save_file({UP: sick(8, 8)}, folder / "model.safetensors")
        if name != "config.json":
            (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / name).write_bytes(body)
        refused_soon(folder, "lists|bytes", peak=150 << 20)
    head = body + b" " * (-len(body) % 8)
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head)
    refused_soon(path, "lists", peak=150 << 20)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)
ENTRY = st.fixed_dictionaries({
    "dtype": st.sampled_from(["F32", "BF16", "F4", "U8", "x"]) | JSON,
    "shape": st.lists(st.integers(-1, 4) | st.integers(2**62, 2**64), max_size=3) | JSON,
    "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | JSON,
})  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=4), ENTRY | JSON, max_size=4), st.integers(0, 64))
def test_any_header_is_read_whole_or_refused(table, buffer):
    try:
        header = parse_header(json.dumps(table).encode(), buffer)
    except ValueError:
        return
    assert sum(entry.end - entry.begin for entry in header.entries.values()) == buffer
    assert set(header.entries) | {"__metadata__"} == set(table) | {"__metadata__"}


@settings(max_examples=200, deadline=None)
@given(JSON | st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=5), st.text(max_size=5) | JSON)}))
def test_any_index_stays_in_its_folder(content):
    try:
        table = parse_index(json.dumps(content).encode())
    except ValueError:
        return
    assert table
    assert all("/" not in file and file not in {"", ".", ".."} for file in table.values())


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([*PAYLOADS, *OBJECTS]), max_size=8), st.randoms(use_true_random=False))
def test_any_program_is_read_or_refused_and_never_runs(steps, chance):
    program = damage_pickle(b"\x80\2}(" + b"".join(steps) + b"u" * chance.randrange(2) + b".", chance)
    for read in (read_pickle, read_metadata):
        with contextlib.suppress(ValueError):
            read(program)
    assert not Path(MARKER).exists()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40), st.integers(0, 500))
def test_any_bytes_over_an_archive_are_read_or_refused(patch, at):
    data = bytearray(raw_zip([("x/data.pkl", b"N."), ("x/data/0", b"0123"), ("x/version", b"3\n")]))
    at %= len(data)
    data[at : at + len(patch)] = patch
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        try:
            records = read_archive(file.fileno(), 0, len(data))
        except ValueError:
            return
    assert all(0 <= record.begin <= record.offset <= record.end <= len(data) for record in records.values())


def test_an_optimizer_state_that_contradicts_itself_is_refused(tmp_path):
    state = b"}(" + text("state") + b"}K\0}(" + text("exp_avg") + tensor() + b"us" + text("param_groups")
    state += b"](}(" + text("eps") + b"K\0" + text("eps") + b"K\1ueu"
    content = b"\x80\2}(" + text("state_dict") + b"}" + text("w") + tensor() + b"s" + text("optimizer") + state + b"u."
    with pytest.raises(CheckpointError, match=r"bomb\.pt does not have a usable optimizer state.*'eps' twice"):
        repair_checkpoint(file_of(tmp_path, content))


def test_thousands_of_optimizers_are_refused(tmp_path):
    state = b"}" + text("state") + b"}K\0}" + text("x") + tensor() + b"sss"
    content = (
        b"\x80\2}(" + text("state_dict") + b"}" + text(UP) + MATRIX + b"s" + text("o") + b"](" + state * 2000 + b"eu."
    )
    refused_soon(file_of(tmp_path, content), "2000 states of optimizers")
