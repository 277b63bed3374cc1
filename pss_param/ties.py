# SPDX-License-Identifier: Apache-2.0
r"""Token tables that are the head as well.

# Note [Tied, as a file tells it]
A checkpoint shows it in one of three ways: both names share their bytes; both are stored, with equal values
(distributed checkpoints; what is loaded last would win); or only one is stored, and the config says that the model ties
it, or it is a ``lm_head`` without any table that has its rows. Configs of headless models, of classifiers and of
discriminators may say so as well, for an output that they do not have. A config that does not tell how its tables are
drawn tells too little: families that scale their logits draw larger.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from pss_param.checkpoint import StoredTensor
from pss_param.families import family_of
from pss_param.selection import Target

__all__ = ["outputs_of", "says_tied", "tied_tables"]

_LANGUAGE_MODEL = re.compile(
    "LMHead|CausalLM|MaskedLM|(?<!Electra)(?<!Funnel)(?<!Splinter)ForPreTraining|ConditionalGeneration|DoubleHeads|MTModel"
)
# Families that divide the head's input by the root of the width, and whose config does not tell how tables are drawn.
_SCALES_LOGITS = frozenset({"switch_transformers", "udop", "pix2struct"})
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
        source: the tensors; only what looks like a copy of a table is read.
        tables: matrices outside the blocks that may be tables, by name.
        maps: the other matrices there, heads among them.

    Returns:
        Their names, with the other names of the same values.
    """
    embeddings = [name for name, target in tables.items() if target.role == "embedding"]
    found = {table: {name for name in maps if _are_one(source, name, table)} for table in tables}
    for table in embeddings:
        found[table] |= {name for name in tables if name not in embeddings and _are_one(source, name, table)}
    copies = set().union(*(found[table] for table in embeddings))
    tied = {table: heads for table, heads in found.items() if heads and table not in copies}
    if tied:
        return tied
    rows = {source.tensors[name].shape[0] for name in embeddings}
    alone = [
        name for name in maps if name.split(".")[-2:-1] == ["lm_head"] and source.tensors[name].shape[0] not in rows
    ]
    said = _table_by_config(source, [tables[name] for name in embeddings], outputs_of(source, maps))
    return {name: set() for name in alone} if alone or said is None else {said: set()}


def outputs_of(source: _Source, maps: Mapping[str, Target]) -> set[int]:
    r"""How many outputs the heads have.

    Args:
        source: the tensors.
        maps: matrices outside the blocks, by name.

    Returns:
        Their rows; what a head does before its last matrix is none of them.
    """
    heads = (name for name, target in maps.items() if target.role == "head" and "transform" not in name.split("."))
    return {source.tensors[name].shape[0] for name in heads}


def _table_by_config(source: _Source, tables: list[Target], outputs: set[int]) -> str | None:
    for table in tables:
        family = family_of(source.config, table.name)
        facts, (rows, columns) = family.config or {}, source.tensors[table.name].shape[:2]
        drawn = table.init_std is not None and family.model_type not in _SCALES_LOGITS
        wide = not family.hidden or columns in {family.hidden, facts.get("embedding_size")}
        if says_tied(facts) and drawn and wide and rows == facts.get("vocab_size") and rows not in outputs:
            return table.name
    return None


def _are_one(source: _Source, name: str, table: str) -> bool:
    one, other = source.tensors[name], source.tensors[table]
    if one.storage == other.storage:
        return True
    if name == table:
        return False
    alike = (one.shape, one.dtype) == (other.shape, other.dtype)
    return alike and all(torch.equal(a, b) for a, b in zip(source.blocks(name), source.blocks(table), strict=False))
