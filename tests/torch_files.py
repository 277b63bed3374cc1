# SPDX-License-Identifier: Apache-2.0
"""Sick models, hostile archives and the checks that all torch formats share."""

import hashlib
import io
import shutil
import struct
import subprocess
import zipfile
import zlib

import torch
from torch import nn

from pss_param.checkpoint.dcp_metadata import read_metadata


def sick(m, n, dtype=torch.float32, seed=0):
    """A fresh matrix plus one direction that is far too strong."""
    source = torch.Generator().manual_seed(seed)
    bulk = torch.randn(m, n, generator=source) / n**0.5
    u, v = torch.randn(m, 1, generator=source), torch.randn(1, n, generator=source)
    return (bulk + 10 * u @ v / (u.norm() * v.norm())).to(dtype)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(width, 2 * width), "down_proj": nn.Linear(2 * width, width)})

    def forward(self, x):
        y = self.norm(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp["down_proj"](self.mlp["up_proj"](x).relu())


class TinyTransformer(nn.Module):
    """Embedding and head are tied."""

    def __init__(self, width=32, layers=2, words=40):
        super().__init__()
        self.embed_tokens = nn.Embedding(words, width)
        self.layers = nn.ModuleList([Block(width) for _ in range(layers)])
        self.lm_head = nn.Linear(width, words, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def make_sick(model):
    """Give every block matrix one overwhelming direction."""
    with torch.no_grad():
        for seed, (name, weight) in enumerate(model.named_parameters()):
            if weight.dim() == 2 and "layers" in name:
                weight.copy_(sick(*weight.shape, seed=seed))
    return model


def check_zip_tools(path):
    """Two independent zip readers find every check sum right."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    if shutil.which("unzip"):
        assert subprocess.run(["unzip", "-tqq", path], capture_output=True, check=False).returncode == 0


def spans(path):
    """SHA-256 of every record of an archive, and of its local header without its check sum."""
    data, found = path.read_bytes(), {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            begin = info.header_offset
            name_size, extra_size = struct.unpack_from("<2H", data, begin + 26)
            start = begin + 30 + name_size + extra_size
            head = data[begin : begin + 14] + data[begin + 18 : start]
            found[info.filename] = hashlib.sha256(data[start : start + info.file_size]).hexdigest()
            found["header of " + info.filename] = hashlib.sha256(head).hexdigest()
    return found


def changed_bytes(old, new):
    """Positions at which two files of one length differ."""
    a, b = old.read_bytes(), new.read_bytes()
    assert len(a) == len(b)
    return [at for at, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]


def raw_zip(records, *, listed=None, offsets=None, method=0, flags=0):
    """A zip archive by hand: `listed` names and `offsets` may contradict the records."""
    body, table = b"", b""
    for at, (name, content) in enumerate(records):
        crc, size, raw = zlib.crc32(content), len(content), name.encode()
        head = struct.pack("<4s5H3L2H", b"PK\3\4", 20, flags, method, 0, 0, crc, size, size, len(raw), 0)
        offset = len(body) if offsets is None else offsets[at]
        said = (listed[at] if listed else name).encode()
        entry = (b"PK\1\2", 20, 20, flags, method, 0, 0, crc, size, size, len(said), 0, 0, 0, 0, 0, offset)
        table += struct.pack("<4s6H3L5H2L", *entry) + said
        body += head + raw + content
    count = len(records)
    return body + table + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(table), len(body), 0)


def torch_like(pickled, storages=()):
    """A torch file around a pickle by hand."""
    records = [("x/data.pkl", pickled), *((f"x/data/{key}", data) for key, data in storages), ("x/version", b"3\n")]
    return raw_zip(records)


def check_slices(path):
    """Every piece is a zip archive with right check sums; returns hashes of the pieces by tensor and origin."""
    found = {}
    for name, entry in read_metadata((path / ".metadata").read_bytes()).items():
        for piece in entry.pieces:
            data = (path / piece.file).read_bytes()[piece.offset : piece.offset + piece.length]
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                assert archive.testzip() is None
            found[name, piece.origin] = hashlib.sha256(data).hexdigest()
    return found
