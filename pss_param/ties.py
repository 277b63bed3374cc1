# SPDX-License-Identifier: Apache-2.0
r"""Token tables that are the head as well.

# Note [Tied, as a file tells it]
A checkpoint shows it in one of three ways: both names share their bytes; both are stored, with equal values
(distributed checkpoints; what is loaded last would win); or only the table is stored, and the config says that the
model ties it. Configs of headless models and of classifiers may say so as well, for an output that they do not have.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from pss_param.checkpoint import StoredTensor
from pss_param.selection import Target

__all__ = ["says_tied", "tied_tables"]

_LANGUAGE_MODEL = re.compile("LMHead|CausalLM|MaskedLM|PreTraining|ConditionalGeneration|DoubleHeads")
_NO_OUTPUT = re.compile("Model$|For[A-Z]")


class _Source(Protocol):
    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any] | None

    def blocks(self, name: str) -> Iterator[Tensor]: ...


def says_tied(config: Mapping[str, Any]) -> bool:
    r"""Tell whether a config says that the table of tokens is the head.

    Args:
        config: content of ``config.json``. Older ones do not name what is the class's default, which is to tie.

    Returns:
        The answer.

    Example:
        >>> says_tied({"architectures": ["GPT2LMHeadModel"]}), says_tied({"architectures": ["GPT2Model"]})
        (True, False)
        >>> says_tied({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False})
        False
    """
    listed, said = config.get("architectures"), config.get("tie_word_embeddings")
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    if said is False:
        return False
    if any(_LANGUAGE_MODEL.search(name) for name in names):
        return True
    return said is True and bool(names) and not any(_NO_OUTPUT.search(name) for name in names)


def tied_tables(source: _Source, tables: Mapping[str, Target], maps: Mapping[str, Target]) -> dict[str, set[str]]:
    r"""Find the tables that are heads: Note [Tied, as a file tells it].

    Args:
        source: the tensors; only a head that looks like a table is read.
        tables: matrices outside the blocks that may be tables, by name.
        maps: the other matrices there, heads among them.

    Returns:
        Their names, with the names that the head has by itself, if any.
    """
    found = {table: {name for name in maps if _are_one(source, name, table)} for table in tables}
    config, outputs = (
        source.config or {},
        {source.tensors[name].shape[0] for name, t in maps.items() if t.role == "head"},
    )
    vocabulary = config.get("vocab_size") if says_tied(config) else None
    for table, heads in found.items():
        rows = source.tensors[table].shape[0]
        if not heads and rows == vocabulary and rows not in outputs:
            found[table] = {table}
    return {table: heads - {table} for table, heads in found.items() if heads}


def _are_one(source: _Source, name: str, table: str) -> bool:
    one, other = source.tensors[name], source.tensors[table]
    if one.storage == other.storage:
        return True
    alike = (one.shape, one.dtype) == (other.shape, other.dtype)
    return alike and all(torch.equal(a, b) for a, b in zip(source.blocks(name), source.blocks(table), strict=False))
