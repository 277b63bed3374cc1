# SPDX-License-Identifier: Apache-2.0
r"""``*.index.json``: which shard holds which tensor, checked against the shards themselves.

The reference loaders believe an index that names the wrong shard, a tensor that is not there or a file
outside the folder; a repair that trusted it would patch something else than what is loaded.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pss_param.errors import CheckpointError

from .safetensors import check_dense
from .stored import StoredTensor

MAX_INDEX = 100_000_000
"""Bytes; that of a model of a million tensors."""


def read_index(path: Path) -> dict[str, str]:
    r"""Read and check an index by itself.

    Args:
        path: the file.

    Returns:
        Name of the shard by tensor name; shards are bare file names.

    Raises:
        CheckpointError: it is no such index, or leads out of its folder.
    """
    if path.stat().st_size > MAX_INDEX:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, an index has at most {MAX_INDEX}")
    try:
        return parse_index(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not a usable index: {error}") from None


def parse_index(text: bytes) -> dict[str, str]:
    r"""Check the content of an index by itself.

    Args:
        text: JSON.

    Returns:
        Name of the shard by tensor name.

    Raises:
        ValueError: a rule is broken.

    Example:
        >>> parse_index(b'{"weight_map": {"w": "../outside.safetensors"}}')
        Traceback (most recent call last):
        ValueError: 'w' is said to be in '../outside.safetensors', which is no bare file name
    """
    check_dense(text)
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table:
        raise ValueError("it has no weight_map")
    for name, file in table.items():
        if not isinstance(file, str):
            raise ValueError(f"the shard of {name!r} is no text")
        if file in {"", ".", ".."} or "/" in file or "\\" in file or "\0" in file:
            raise ValueError(f"{name!r} is said to be in {file!r}, which is no bare file name")
    return table


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("it has a key twice, so readers would disagree")
    return table


def check_index(
    path: Path, index: Mapping[str, str], shards: Mapping[str, Mapping[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    r"""Compare an index with what its shards hold.

    Args:
        path: the index, for messages.
        index: name of the shard by tensor name.
        shards: tensors by name, by name of the shard.

    Returns:
        All tensors, in the order of the shards.

    Raises:
        CheckpointError: a tensor is missing, in another shard, in two shards, or not in the index.
    """
    found: dict[str, StoredTensor] = {}
    home: dict[str, str] = {}
    for file, tensors in shards.items():
        for name, stored in tensors.items():
            if name in home:
                raise CheckpointError(f"{path.parent}: {name} is in two shards, {home[name]} and {file}")
            found[name], home[name] = stored, file
    for name, file in index.items():
        if home.get(name) != file:
            where = f"it is in {home[name]}" if name in home else "no shard has it"
            raise CheckpointError(f"{path} says that {name} is in {file}, but {where}; make the index anew")
    if extra := next((name for name in home if name not in index), None):
        raise CheckpointError(f"{path} does not name {extra}, which is in {home[extra]}; make the index anew")
    return found
