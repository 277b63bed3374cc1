# SPDX-License-Identifier: Apache-2.0
"""Damage to checkpoints: to bytes, to JSON, to zip archives, to folders. Every choice comes from a `Random`."""

import io
import json
import struct
import zipfile
import zlib
from random import Random

from fuzz_pickles import damage_pickle
from fuzz_seeds import Tree
from torch_files import raw_zip

NUMBERS = (0, 1, 2, 7, 8, 127, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


class Raw(str):
    """JSON text that is written as it is."""


class Pairs(list):
    """A JSON object whose keys may repeat."""


def damage_bytes(data: bytes, rng: Random, other: bytes = b"") -> bytes:
    """Damage without knowledge of the format."""
    at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    short = data[at : min(end, at + rng.choice((1, 4, 16, 64)))]
    kind = rng.randrange(11)
    if kind < 3 and data:
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 8))):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 3:
        return data[:at]
    if kind == 4:
        return data + rng.choice((b"\0", b"\0" * 64, data, rng.randbytes(9), b"PK\5\6" + b"\0" * 18))
    if kind == 5:
        return data[:at] + other[min(at, len(other)) :]
    if kind == 6:
        return data[:at] + data[at + len(short) :]
    if kind == 7:
        return data[:end] + short + data[end:]
    if kind == 8:
        return data[:at] + rng.randbytes(len(short)) + data[at + len(short) :]
    if kind == 9:
        return rng.choice((b"", b"\0", b"version https://git-lfs.github.com/spec/v1\n", rng.randbytes(40), other[:99]))
    width = rng.choice((1, 2, 4, 8))
    number = rng.choice((*NUMBERS, len(data), len(data) - 1, at)) % 256**width
    return data[:at] + number.to_bytes(width, rng.choice(("little", "little", "big"))) + data[at + width :]


def damage_json(text: bytes, rng: Random, names: tuple[str, ...] = ()) -> bytes:
    """Edit one place of a JSON text; `names` are files that a path may be changed to."""
    try:
        done = _edited(text, rng, names).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):  # damaged before
        return damage_bytes(text, rng)
    extra = rng.randrange(30)
    if extra == 0:
        cut = rng.randrange(len(done))
        return done[:cut] + rng.choice((b"\xff", b"\xed\xa0\x80", b"\0", b"\xc0\xaf", b"\xef\xbb\xbf")) + done[cut:]
    if extra == 1:
        return rng.choice((done + b" " * 70, done + b"{}", b"\xef\xbb\xbf" + done, b"\xff\xfe" + done))
    return done


def _edited(text, rng, names):
    tree = json.loads(text, object_pairs_hook=Pairs)
    for _ in range(rng.choice((1, 1, 1, 2))):
        if places := list(_places(tree)):
            _edit(*rng.choice(places), rng, names)
    return _dump(tree)


def _places(node):
    if isinstance(node, Pairs):
        for at, (_, value) in enumerate(node):
            yield node, at
            yield from _places(value)
    elif isinstance(node, list):
        for at, value in enumerate(node):
            yield node, at
            yield from _places(value)


def _edit(holder, at, rng, names):
    key, value = holder[at] if isinstance(holder, Pairs) else (None, holder[at])
    kind = rng.randrange(10)
    if kind == 0:
        del holder[at]
        return
    if kind == 1:
        holder.insert(rng.randrange(len(holder) + 1), holder[at])
        return
    if kind == 2 and len(holder) > 1:
        other = rng.randrange(len(holder))
        holder[at], holder[other] = holder[other], holder[at]
        return
    if kind == 3 and key is not None:
        key = rng.choice(("", "x" * 5000, "\ud800", "a\nb", "\x1b[31m", "__metadata__", "../x", key + ".weight", "\0"))
    elif kind in (4, 5) and type(value) is int:
        value = rng.choice(
            (*NUMBERS, -1, -value, value + 1, value - 1, value * 2, 10**400, Raw("9" * 5000), Raw(f"{value}.0"))
        )
    elif kind in (4, 5) and isinstance(value, str):
        value = rng.choice((*names, *_TEXTS, *_DTYPES, value + "x", value.upper()))
    else:
        value = rng.choice(_VALUES)
    holder[at] = (key, value) if isinstance(holder, Pairs) else value


_DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "F6_E2M3",
    "C64",
    "U8",
    "I8",
    "BOOL",
    "U16",
    "U32",
    "U64",
    "I64",
    "f32",
]
_TEXTS = (
    "",
    ".",
    "..",
    "../model.safetensors",
    "/etc/passwd",
    "a\0b",
    "a\nb",
    "\ud800",
    "x" * 5000,
    "C:\\x",
    "é",
    "\u202e",
)
_VALUES = (
    None, True, False, 0, -1, 1.5, "", "x", [], Pairs(), [[]], 1e308, Raw("1e999"), Raw("NaN"), Raw("-Infinity"),
    Raw("[" * 10_000 + "]" * 10_000), Raw('{"a":' * 10_000 + "1" + "}" * 10_000), Raw("[" * 100_000), [0] * 70,
    [0, 2**62, 2**62], [0, 2**63 - 1], Raw("[" + "1," * 5000 + "1]"), [1, 0], [2**32, 2**32], [0], [-1, 8], [True, 8],
)  # fmt: skip


def _dump(node):
    if isinstance(node, Raw):
        return str(node)
    if isinstance(node, Pairs):
        return "{" + ",".join(f"{json.dumps(key, ensure_ascii=False)}:{_dump(value)}" for key, value in node) + "}"
    if isinstance(node, list):
        return "[" + ",".join(map(_dump, node)) + "]"
    return json.dumps(node, ensure_ascii=isinstance(node, str) and "\ud800" in node)


def damage_safetensors(data: bytes, rng: Random) -> bytes:
    """Edit the header of a safetensors file, or its length."""
    length = int.from_bytes(data[:8], "little")
    head, body = data[8 : 8 + length], data[8 + length :]
    if not rng.randrange(6):
        said = rng.choice((*NUMBERS, length - 1, length + 1, len(data), len(data) - 8, 10**8, 10**8 + 1))
        return said.to_bytes(8, "little") + data[8:]
    head = damage_json(head, rng)
    said = len(head) if rng.randrange(12) else length
    return said.to_bytes(8, "little") + head + body


_FIELDS = {
    b"PK\1\2": (4, 6, 8, 10, 16, 20, 24, 28, 30, 32, 34, 42),
    b"PK\3\4": (4, 6, 8, 14, 18, 22, 26, 28),
    b"PK\5\6": (4, 6, 8, 10, 12, 16, 20),
    b"PK\6\6": (4, 12, 16, 20, 24, 32, 40, 48),
    b"PK\6\7": (4, 8, 16),
    b"PK\7\10": (4, 8, 12, 16),
}


def damage_zip(data: bytes, rng: Random) -> bytes:
    """Damage an archive: a field of its structure, its records, or the pickle in it."""
    kind = rng.randrange(8)
    if kind < 3:
        return _damage_field(data, rng)
    records = read_records(data)
    if not records:
        return damage_bytes(data, rng)
    if kind < 6:
        return raw_zip([(n, damage_pickle(c, rng) if n.endswith("data.pkl") else c) for n, c in records])
    return _damage_records(records, rng)


def _damage_field(data, rng):
    marks = [at for at in range(len(data)) if data.startswith(b"PK", at) and data[at : at + 4] in _FIELDS]
    if not marks:
        return damage_bytes(data, rng)
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2))):
        # The last ones are those of the list.
        mark = rng.choice(marks if rng.randrange(2) else marks[-6:])
        at, width = mark + rng.choice(_FIELDS[data[mark : mark + 4]]), rng.choice((2, 4, 8))
        old = int.from_bytes(data[at : at + width], "little")
        new = rng.choice((*NUMBERS, old + 1, old - 1, old ^ 8, len(data), mark)) % 256**width
        changed[at : at + width] = new.to_bytes(width, "little")
    return bytes(changed)


def read_records(data: bytes) -> list[tuple[str, bytes]]:
    """Names and contents of the records of an undamaged archive, else nothing."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return [(name, archive.read(name)) for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, EOFError, struct.error, zlib.error, RuntimeError):
        return []


def _damage_records(records, rng):
    at = rng.randrange(len(records))
    name, content = records[at]
    kind = rng.randrange(9)
    if kind == 0:
        records.pop(at)
    elif kind == 1:
        records.insert(rng.randrange(len(records) + 1), (name, content[: len(content) // 2]))
    elif kind == 2:
        new = (
            f"../{name}",
            name.upper(),
            "a/constants.pkl",
            "é",
            "x/y/data.pkl",
            "one/data.pkl",
            f"{name}\0",
            "x" * 999,
        )
        records[at] = (rng.choice(new), content)
    elif kind == 3:
        records[at] = (name, damage_bytes(content, rng, records[0][1]))
    elif kind == 4:
        rng.shuffle(records)
    elif kind == 5:
        return raw_zip(records, listed=[n for n, _ in records[1:] + records[:1]])
    elif kind == 6:
        offsets = [rng.randrange(3000) for _ in records]
        return raw_zip(records, offsets=offsets)
    elif kind == 7:
        return raw_zip(records, method=rng.choice((0, 8, 99)), flags=rng.choice((0, 1, 8, 2048)))
    else:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if rng.randrange(2) else zipfile.ZIP_STORED) as archive:
            for n, c in records:
                archive.writestr(n, c)
            archive.comment = b"PK\5\6" * rng.randrange(2)
        return out.getvalue()
    return raw_zip(records)


_WORDS = [struct.pack("<f", x) for x in (float("nan"), float("inf"), 3e38, -3e38, 1e30, 1e-45, 1e-30, 0.0, -0.0, 1e19)]


def damage_values(data: bytes, rng: Random) -> bytes:
    """Put numbers of extreme size where those of tensors often lie."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 4, 32))):
        at = rng.randrange(len(data) // 4 + 1) * 4
        changed[at : at + 4] = rng.choice(_WORDS)[: len(data[at : at + 4])]
    return bytes(changed)


def damage_file(tree: Tree, name: str, rng: Random, seeds: dict[str, Tree]) -> bytes:
    """Damage one file in a way that fits its content, or in a way that fits none."""
    data = tree[name]
    kind = rng.randrange(8)
    if kind == 0:
        return damage_values(data, rng)
    if kind < 3:
        other = rng.choice([d for t in seeds.values() for d in t.values()])
        return damage_bytes(data, rng, other)
    if data[:4] == b"PK\3\4":
        return damage_zip(data, rng)
    if data[:1] == b"{" or data[:1] == b"[":
        return damage_json(data, rng, tuple(tree))
    if data[8:9] == b"{":
        return damage_safetensors(data, rng)
    if data[:1] == b"\x80":
        return damage_pickle(data, rng)
    return damage_bytes(data, rng)


def damage(seeds: dict[str, Tree], rng: Random) -> tuple[str, Tree, str]:
    """Damage one of the seeds.

    Returns:
        Name of the seed, its files after the damage, and something odd to be put beside them (see
        :data:`ODD`).
    """
    seed = rng.choice(list(seeds))
    tree = dict(seeds[seed])
    if len(tree) > 1 and not rng.randrange(8):
        return seed, tree, damage_folder(tree, rng, seeds)
    for _ in range(rng.choice((1, 1, 1, 2))):
        telling = [
            n for n in tree if n not in {"scheduler.pt", "rng_state.pth", "random_states_0.pkl", "sub/notes.txt"}
        ]
        name = rng.choice([*telling, *(n for n in ("config.json", "order.json") if n in telling)])
        tree[name] = damage_file(tree, name, rng, seeds)
    return seed, tree, ""


ODD = ("pipe", "loop", "dangling", "outside", "folder", "empty folder")


def damage_folder(tree: Tree, rng: Random, seeds: dict[str, Tree]) -> str:
    """Remove, rename, copy or exchange files, or ask for something odd."""
    name, other = rng.choice(list(tree)), rng.choice(list(tree))
    kind = rng.randrange(6)
    if kind == 0:
        del tree[name]
    elif kind == 1:
        new = (
            "x",
            ".metadata",
            "model.bin",
            "optimizer.pt",
            "model_1.safetensors",
            "a\nb.safetensors",
            "é.pt",
            "latest",
        )
        tree[rng.choice(new)] = tree[name] if rng.randrange(2) else tree.pop(name)
    elif kind == 2:
        tree[name], tree[other] = tree[other], tree[name]
    elif kind == 3:
        tree[name] = rng.choice(list(rng.choice(list(seeds.values())).values()))
    elif kind == 4:
        tree[name] = tree[other]
    else:
        return rng.choice(ODD)
    return ""
