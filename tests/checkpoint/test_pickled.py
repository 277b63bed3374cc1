# SPDX-License-Identifier: Apache-2.0
"""The pickle reader: honest structures come out, hostile programs neither run nor grow."""

import collections
import contextlib
import pickle
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pss_param.checkpoint.pickled import MAX_OPCODES, Global, Made, Table, read_pickle


def unfold(node):
    """What plain data would be after unpickling."""
    if isinstance(node, Table):
        return {unfold(key): unfold(value) for key, value in node.pairs}
    if isinstance(node, Made):
        if node.path == "collections.OrderedDict":
            return {unfold(key): unfold(value) for key, value in node.pairs}
        return set(map(unfold, node.elements))
    if isinstance(node, list | tuple):
        return type(node)(map(unfold, node))
    return node


PLAIN = {
    "numbers": [0, -1, 255, 65536, -(2**40), 2**200, 1.5, float("inf"), True, False, None],
    "texts": ["", "a\u00fc\U0001f600", "x" * 300, b"", b"\0" * 300],
    "nested": ({"a": (1, (2, (3, (4, 5)))), "b": [[], [[]]]},),
    "many": list(range(3000)),
    "pairs": {i: str(i) for i in range(1500)},
    "ordered": collections.OrderedDict(a=1, b=2),
}


@pytest.mark.parametrize("protocol", range(2, 6))
def test_plain_data_comes_out_as_it_was(protocol):
    # Before protocol 3, bytes are a call.
    plain = {**PLAIN, "texts": [text for text in PLAIN["texts"] if isinstance(text, str) or protocol > 2]}
    assert unfold(read_pickle(pickle.dumps(plain, protocol))) == plain


def test_sharing_and_cycles_are_kept():
    inner = [1]
    cycle = [inner, inner]
    cycle.append(cycle)
    read = read_pickle(pickle.dumps(cycle))
    assert read[0] is read[1]
    assert read[2] is read


class Marker:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def payloads(flag):
    text = f"open({str(flag)!r}, 'w')".encode()
    touch = b"ctouch %s" % str(flag).encode()
    return {
        "reduce": pickle.dumps(Marker(flag)),
        "eval": b"c__builtin__\neval\n(V" + text + b"\ntR.",
        "system": b"cos\nsystem\n(V" + touch[1:] + b"\ntR.",
        "stack global": b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93\x8c" + bytes([len(text)]) + text + b"\x85R.",
        "inst": b"(V" + text + b"\ni__builtin__\neval\n.",
        "obj": b"(cbuiltins\neval\nV" + text + b"\no.",
        "newobj": b"\x80\x02cbuiltins\neval\nV" + text + b"\n\x85\x81.",
        "newobj_ex": b"\x80\x04cbuiltins\neval\nV" + text + b"\n\x85}\x92.",
        "build": b"cbuiltins\nobject\n)R}V__setstate__\ncbuiltins\neval\nsbV" + text + b"\nb.",
        "getattr": b"cbuiltins\ngetattr\n(cos\nV\nsystem\ntR(V" + touch[1:] + b"\ntR.",
        "dotted": b"cos\npath.os.system\n(V" + touch[1:] + b"\ntR.",
        "import": b"cnot.a.module\nthing\n.",
    }


@pytest.mark.parametrize("name", sorted(payloads(Path("x"))))
def test_payloads_are_only_noted(tmp_path, name, monkeypatch):
    flag = tmp_path / "executed"
    monkeypatch.setattr("builtins.__import__", _no_import(__import__))
    with contextlib.suppress(ValueError):
        read_pickle(payloads(flag)[name])
    assert not flag.exists()


def _no_import(real):
    def guarded(name, *args, **kwargs):
        assert name != "not.a.module"
        return real(name, *args, **kwargs)

    return guarded


def test_the_payloads_are_real(tmp_path):
    flag = tmp_path / "executed"
    for name in ("reduce", "eval", "system", "inst", "obj"):
        pickle.loads(payloads(flag)[name])
        assert flag.exists(), name
        flag.unlink()


def test_a_whitelist_refuses_even_the_mention():
    assert isinstance(read_pickle(b"ctorch\nSize\n.", {"torch.Size"}.__contains__), Global)
    with pytest.raises(ValueError, match=r"mentions 'os.system'"):
        read_pickle(b"cos\nsystem\n.", {"torch.Size"}.__contains__)


BROKEN = {
    "empty": (b"", "broken"),
    "no stop": (b"}", "broken"),
    "nothing to give": (b".", "broken"),
    "tail": (b"N.N", "ends at byte 2"),
    "junk": (b"\xff\xff", "broken"),
    "cut text": (b"X\xff\0\0\0abc.", "broken"),
    "text of a giant": (b"\x8d" + struct.pack("<Q", 1 << 62) + b"a.", "broken"),
    "bytearray of a giant": (b"\x96" + struct.pack("<Q", 1 << 40) + b"a.", "broken"),
    "no memo": (b"h\7.", "broken"),
    "no mark": (b"Nt.", "broken"),
    "reduce of nothing": (b"R.", "broken"),
    "tuple of nothing": (b"\x87.", "tuple of more"),
    "odd dictionary": (b"(Nd.", "no dictionary"),
    "items for a list": (b"](NNu.", "no dictionary"),
    "elements for a dictionary": (b"}(Ne.", "no list"),
    "state for a list": (b"]Nb.", "state for something"),
    "persistent text": (b"Pabc\n.", "PERSID"),
    "extension": (b"\x82\x01.", "EXT1"),
    "buffer": (b"\x97.", "NEXT_BUFFER"),
    "python 2 text": (b"S'a'\n.", "STRING"),
    "number as a name": (b"K\1K\2\x93.", "no text"),
    "long integer": (b"\x8b" + struct.pack("<i", 4096) + b"\x7f" * 4096 + b".", "bits"),
    "long decimal": (b"L" + b"9" * 5000 + b"L\n.", "broken"),
    "bad utf-8": (b"X\2\0\0\0\xff\xff.", "broken"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_programs_are_value_errors(name):
    data, reason = BROKEN[name]
    with pytest.raises(ValueError, match=reason):
        read_pickle(data)


BOMBS = {
    "memo slot": b"Nr" + struct.pack("<I", 2**32 - 1) + b".",
    "nested lists": b"]" * 60_000 + b"a" * 59_999 + b".",
    "nested tuples": b"N" + b"\x85" * 60_000 + b".",
    "laughs as a key": b"}N" + b"2\x86" * 100 + b"Ns.",
    "laughs": b"N" + b"2\x86" * 60_000 + b".",
    "chain of calls": b"cos\nsystem\n" + b")R" * 60_000 + b".",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_cost_little_time_and_memory(name):
    start = time.perf_counter()
    tracemalloc.start()
    read_pickle(BOMBS[name])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300 << 20
    assert time.perf_counter() - start < 20


def test_programs_end(monkeypatch):
    monkeypatch.setattr("pss_param.checkpoint.pickled.MAX_OPCODES", 1000)
    monkeypatch.setattr("pss_param.checkpoint.pickled.MAX_CALLS", 100)
    assert MAX_OPCODES > 1000
    with pytest.raises(ValueError, match="1000 opcodes"):
        read_pickle(b"N0" * 600 + b"N.")
    with pytest.raises(ValueError, match="100 objects"):
        read_pickle(b"\x8f0" * 200 + b"N.")


ALPHABET = [
    bytes([code])
    for code in b"()]}0123acdeghijklmoqrstub.NRQTVXK\x80\x81\x85\x86\x87\x88\x89\x8c\x8f\x90\x91\x92\x93\x94"
]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(ALPHABET), st.binary(max_size=4)), max_size=60).map(b"".join))
def test_any_bytes_are_read_or_refused(data):
    with contextlib.suppress(ValueError):
        read_pickle(data)
    with contextlib.suppress(ValueError):
        read_pickle(b"N}](" + data + b".")
