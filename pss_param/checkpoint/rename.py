# SPDX-License-Identifier: Apache-2.0
r"""A ``.safetensors`` file with other names for its tensors: a new header before copied spans."""

import json
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from pss_param.errors import CheckpointError

from .layout import Layout
from .safetensors import Header, SafetensorsLayout
from .transfer import copy_range, write_all
from .write import StagedFile, check_not_source


def write_renamed(layout: Layout, names: Mapping[str, str], destination: Path, force: bool = False) -> Iterator[int]:
    r"""Write a copy with other names.

    Args:
        layout: the open source.
        names: stored key by new key; stored keys that are not there are left out.
        destination: the copy.
        force: whether an existing file may be replaced.

    Yields:
        int: bytes of each step.

    Raises:
        CheckpointError: the source is of another format, or the destination cannot be written.
    """
    if not isinstance(layout, SafetensorsLayout):
        raise CheckpointError(f"{layout.path} is {layout.format}; only single .safetensors files can be renamed in")
    check_not_source(destination, layout.path)
    text, order = renamed_header(layout.header, names)
    entries = [layout.header.entries[old] for old in order]
    source = layout.fd(layout.path.name)
    with StagedFile(destination, stat.S_IMODE(layout.stat(layout.path.name).st_mode), force) as staged:
        staged.reserve(len(text) + sum(entry.end - entry.begin for entry in entries))
        write_all(staged.fd, 0, text)
        position = len(text)
        for entry in entries:
            start = layout.header.data + entry.begin
            for step in copy_range(source, staged.fd, start, entry.end - entry.begin, to=position):
                position += step
                yield step
        layout.check_unchanged()
        staged.publish()


def renamed_header(header: Header, names: Mapping[str, str]) -> tuple[bytes, list[str]]:
    r"""Make a header with other names; metadata, types, shapes and the order of the buffer stay.

    Args:
        header: the old one.
        names: old key by new key; old keys that are not there are left out.

    Returns:
        The length and the JSON as bytes, and the old keys in the order of the buffer.
    """
    order = sorted(names.values(), key=lambda old: (header.entries[old].begin, header.entries[old].end))
    offsets, position = {}, 0
    for old in order:
        size = header.entries[old].end - header.entries[old].begin
        offsets[old] = [position, position + size]
        position += size
    table: dict[str, object] = {} if header.metadata is None else {"__metadata__": header.metadata}
    for new, old in names.items():
        entry = header.entries[old]
        table[new] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets[old]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order
