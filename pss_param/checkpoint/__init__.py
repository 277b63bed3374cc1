# SPDX-License-Identifier: Apache-2.0
r"""Bytes on disk: one module per format behind :class:`Layout`, one writer for all."""

from .edit import Editor
from .layout import Layout
from .sniff import open_checkpoint
from .stored import Chunk, StoredTensor
from .write import StagedFile, write_file

__all__ = ["Chunk", "Editor", "Layout", "StagedFile", "StoredTensor", "open_checkpoint", "write_file"]
