# SPDX-License-Identifier: Apache-2.0
r"""From a path to an open :class:`Layout`: by content, never by file name alone."""

import json
import os
from pathlib import Path
from typing import Any

from pss_param.errors import CheckpointError

from .dcp import DcpLayout
from .folder import FolderLayout
from .layout import Layout
from .safetensors import SafetensorsLayout
from .start import is_torch_zip, refuse_pickle
from .torch_zip import TorchZipLayout

MAX_CONFIG = 4 << 20
"""Bytes of a ``config.json``."""


def open_checkpoint(path: str | os.PathLike[str]) -> Layout:
    r"""Recognise a checkpoint.

    Args:
        path: a file, or a folder with weights at its top.

    Returns:
        A layout; enter it as a context manager to read.

    Raises:
        CheckpointError: nothing is there, or it is of no known format.

    Example:
        >>> try:
        ...     open_checkpoint("no/such/file.safetensors")
        ... except CheckpointError as error:
        ...     print(error)
        no/such/file.safetensors does not exist; check the path
    """
    where = Path(path)
    if not where.exists():
        raise CheckpointError(f"{where} does not exist; check the path")
    if where.is_dir():
        return _open_folder(where)
    if not where.is_file():
        raise CheckpointError(f"{where} is no regular file; copy the checkpoint to a disk first")
    refuse_pickle(where)
    layout: Layout = TorchZipLayout(where) if is_torch_zip(where) else SafetensorsLayout(where)
    try:
        layout.config = read_config(where.parent)
    except CheckpointError as error:  # a single file may lie beside a config.json of something else
        layout.notes = (f"{where.name} is read without a config: {error}",)
    return layout


def _open_folder(path: Path) -> Layout:
    if (path / ".metadata").is_file():
        layout: Layout = DcpLayout(path)
    else:
        layout = FolderLayout(path)
    layout.config = read_config(path)
    return layout


def read_config(folder: Path) -> dict[str, Any] | None:
    r"""The model's ``config.json`` beside its weights.

    Args:
        folder: where the weights lie.

    Returns:
        Its content, or None where there is no such file.

    Raises:
        CheckpointError: it is there but is no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_CONFIG:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, a config has a few thousand; move it away")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({str(error)[:100]}); mend it or move it away") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no JSON object; mend it or move it away")
    return content
