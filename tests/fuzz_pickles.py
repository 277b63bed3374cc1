# SPDX-License-Identifier: Apache-2.0
"""Damage to pickles by their opcodes: payloads that leave a mark when they run, huge numbers, deep nests, cycles."""

import contextlib
import pickletools
import struct
from random import Random

MARKER = "fuzz-payload-ran"
"""File that every payload makes in the folder where it runs."""

_CODE = f"open({MARKER!r}, 'w')"
_SHELL = f"touch {MARKER}"


def _call(module: str, name: str, argument: str) -> bytes:
    return f"c{module}\n{name}\n(V{argument}\ntR".encode()


def _stack_call(module: str, name: str, argument: str) -> bytes:
    texts = (struct.pack("<cL", b"X", len(text)) + text for text in map(str.encode, (module, name)))
    return b"".join(texts) + b"\x93" + struct.pack("<cL", b"X", len(argument)) + argument.encode() + b"\x85R"


PAYLOADS = (
    _call("os", "system", _SHELL),
    _call("posix", "system", _SHELL),
    _call("builtins", "exec", _CODE),
    _call("builtins", "eval", _CODE),
    _call("__builtin__", "eval", _CODE),
    _stack_call("os", "system", _SHELL),
    _stack_call("builtins", "exec", _CODE),
    f"(V{_SHELL}\nios\nsystem\n".encode(),
    f"(cos\nsystem\nV{_SHELL}\no".encode(),
    f"cbuiltins\nfrozenset\n(cbuiltins\nmap\n(cbuiltins\neval\n(V{_CODE}\nlt\x81t\x81".encode("latin-1"),
    f"cfunctools\npartial\n(cbuiltins\nexec\ntR(V{_CODE}\ntR".encode(),
    f"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(Vos\ntRVsystem\ntR(V{_SHELL}\ntR".encode(),
)
"""Programs that push one value; CPython's unpickler would run every one of them."""

OBJECTS = (
    b"N", b"\x88", b"}", b"]", b")", b"K\x01", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"\x8a\x00",
    b"\x8b\xff\xff\xff\x7f", b"\x8b\x00\x10\x00\x00" + b"\x7f" * 4096,
    b"G\x7f\xf8" + b"\0" * 6, b"G\x7f\xf0" + b"\0" * 6,
    b"X\xff\xff\xff\xff", b"X\x03\0\0\0\xed\xa0\x80", b"X\x01\0\0\0\n", b"X\x10\x27\0\0" + b"x" * 10_000,
    b"\x8d" + b"\xff" * 8, b"I" + b"9" * 5000 + b"\n", b"L" + b"9" * 300 + b"L\n", b"I-1\n", b"F1e999\n",
    b"]q\xfe" + b"h\xfea", b"}q\xfd" + b"h\xfdh\xfds", b"(" * 10_000, b")" + b"\x85" * 10_000, b"]" * 10_000,
    b"}" + b"}" * 5000 + b"K\x00" * 0, b"r\xff\xff\xff\x7f", b"j\xff\xff\xff\x7f", b"h\xff", b"0" * 40, b"2" * 1000,
    b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n)R", b"\x82\x01",
    b"\x95" + b"\xff" * 8, b"Pabc\n", b"Q", b"\x97", b"\x98", b"\x8f", b"\x96\x04\0\0\0\0\0\0\0abcd", b"]" + b"2a" * 99,
    b"(K\x01" * 200 + b"t" * 200, b"\x80\x05", b"\x80\xff", b".", b"b", b"R", b"s", b"u", b"e", b"t", b"\x87", b"1",
)  # fmt: skip
"""Opcodes with odd arguments, and values of odd kinds."""


def split(data: bytes) -> list[bytes]:
    """Cut a pickle into its opcodes; what cannot be read is one piece at the end."""
    begins: list[int] = []
    with contextlib.suppress(ValueError, IndexError):
        begins.extend(at for _, _, at in pickletools.genops(data) if at is not None)
    if not begins:
        return []
    return [data[at:end] for at, end in zip(begins, [*begins[1:], len(data)], strict=True)]


def damage_pickle(data: bytes, rng: Random) -> bytes:
    """Edit the program at the border of two opcodes."""
    steps = split(data)
    if len(steps) < 3:
        return data
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _edit(steps, rng)
    return b"".join(steps)


_VALUES = frozenset(b"NKJMXUGC)]}\x88\x89\x8a\x8c")


def _edit(steps: list[bytes], rng: Random) -> None:
    at, other = rng.randrange(len(steps) - 1), rng.randrange(len(steps) - 1)
    kind = rng.randrange(12)
    values = [i for i, step in enumerate(steps) if step[:1] and step[0] in _VALUES] or [at]
    numbers = [i for i, step in enumerate(steps) if step[:1] in (b"K", b"M", b"J", b"\x8a")] or [at]
    if kind == 0:
        del steps[at]
    elif kind == 1:
        steps.insert(other, steps[at])
    elif kind == 2:
        steps[at], steps[other] = steps[other], steps[at]
    elif kind == 3:
        steps.insert(at, rng.choice(PAYLOADS) + b"0")
    elif kind == 4:
        steps[rng.choice(values)] = rng.choice(PAYLOADS)
    elif kind == 5:
        steps[-1:] = [rng.choice((b"", b"0")), rng.choice(PAYLOADS), steps[-1]]
    elif kind == 6:
        steps.insert(at, rng.choice(OBJECTS))
    elif kind == 7:
        steps[rng.choice(values)] = rng.choice(OBJECTS)
    elif kind < 10:
        number = rng.choice(
            (0, 1, 2, 3, 7, 8, 12, 96, 255, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**200, -1, -(2**63))
        )
        text = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
        steps[rng.choice(numbers)] = bytes([0x8A, len(text)]) + text
    elif kind == 10:
        globals_ = [i for i, step in enumerate(steps) if step[:1] == b"c"] or [at]
        new = (
            b"cos\nsystem\n",
            b"cbuiltins\nexec\n",
            b"ctorch\nHalfStorage\n",
            b"ctorch\nfloat16\n",
            b"c\n\n",
            b"cx\ny\n",
        )
        swap = [steps[i] for i in globals_]
        steps[rng.choice(globals_)] = rng.choice((*new, *swap))
    else:
        first, last = sorted((at, other))
        part = steps[first : min(last, first + 20)]
        steps[other:other] = part
