# SPDX-License-Identifier: Apache-2.0
r"""What a weight is for, told by its name: q, k, v, o, gate, up, down, embedding, head, ...

A name is read from its end: the leaf module says the role, the words before it the context (`dense` is the
output projection inside `attention`, and the way down inside an MLP). Wrappers that trainers put around a
model are left out first. The block is the first number in the name that still has a module behind it:
`model.layers.3.mlp.up_proj.weight` is in block 3, `net.3.weight` is in none, since there the number is the
layer itself.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

# DDP and DeepSpeed, torch.compile, FSDP1, activation checkpointing, Lightning Fabric, peft's base layers.
_WRAPPERS = frozenset({
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
    "base_layer",
})  # fmt: skip


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ATTENTION = {
    "q": "q q_proj query q_lin wq to_q q_proj_weight q_attn query_proj query_layer w_q linear_q q_net",
    "k": "k k_proj key k_lin wk to_k k_proj_weight key_proj key_layer w_k linear_k k_net",
    "v": "v v_proj value v_lin wv to_v v_proj_weight value_proj value_layer w_v linear_v v_net",
    "qkv": "qkv qkv_proj query_key_value c_attn in_proj_weight wqkv in_proj to_qkv w_pack",
    "kv": "kv kv_proj to_kv wkv key_value",
    "o": "o o_proj out_proj c_proj wo dense proj to_out out_lin out w_o linear_out proj_out o_net output",
    "q_a": "q_a_proj",
    "q_b": "q_b_proj",
    "kv_a": "kv_a_proj_with_mqa kv_a_proj",
    "kv_b": "kv_b_proj",
}
# These leaves say attention by themselves; the others need an attention around them.
_PLAINLY_ATTENTION = _words("""
    q_proj k_proj v_proj o_proj qkv_proj query_key_value c_attn in_proj_weight wq wk wv wo wqkv to_q
    to_k to_v to_qkv q_lin k_lin v_lin out_lin q_proj_weight k_proj_weight v_proj_weight qkv q_attn
""")
_MLP = {
    "gate": "gate_proj wi_0 w1 gate",
    "up": "up_proj fc1 c_fc dense_h_to_4h wi wi_1 w3 linear1 fc_in lin1 fc up ffn intermediate fc_1",
    "gate_up": "gate_up_proj gate_up w12",
    "down": "down_proj fc2 c_proj dense_4h_to_h wo w2 linear2 fc_out lin2 proj down ffn_output output fc_2",
    "router": "router wg",
}
_PLAINLY_MLP = _words("""
    gate_proj up_proj down_proj gate_up_proj fc1 fc2 c_fc dense_h_to_4h dense_4h_to_h linear1 linear2
    lin1 lin2 wi wi_0 wi_1 fc_in fc_out w1 w2 w3 w12 router ffn ffn_output intermediate
""")
_HEADS = _words("""
    lm_head head heads classifier score embed_out qa_outputs predictions unembed logits generator
    proj_out output_projection
""")
_EMBEDDING = re.compile(
    r"embed|(^|_)embs?$|^w[tpe]e$|relative_.*bias|rel_pos|^pos_emb|^shared$|(cls|mask|dist)_token|codebook"
)
_RECURRENT = re.compile(r"^weight_(ih|hh)(_l\d+)?(_reverse)?$")
_NORM = re.compile(r"norm|^ln(_?\w{1,2})?$|^bn\d*$")
_WORD_ATTENTION = re.compile(r"att(n|ention)?$|^attn|attention|^self$")
_WORD_MLP = re.compile(r"mlp|^ffn?$|feed_?forward|dense_?relu_?dense|expert|moe|^intermediate$|^output$")


def _reversed(table: dict[str, str]) -> dict[str, str]:
    return {leaf: role for role, leaves in table.items() for leaf in leaves.split()}


_ATTENTION_LEAF, _MLP_LEAF = _reversed(_ATTENTION), _reversed(_MLP)

ATTENTION_ROLES = frozenset({*_ATTENTION, "attention"})
"""Roles inside attention; `attention` is a matrix of attention that no table knows."""

MLP_ROLES = frozenset(
    {"gate", "up", "gate_up", "down", "mlp"} | {f"expert_{role}" for role in ("gate", "up", "gate_up", "down", "mlp")}
)
"""Roles inside feed-forward layers, dense and of experts; the router is in neither set."""


def plain_name(name: str) -> str:
    """Leave out what trainers put around a model: DDP's `module.`, compile's `_orig_mod.`, FSDP's wrappers.

    Args:
        name: dotted name of a weight.

    Returns:
        The name in the bare model.

    Example:
        >>> plain_name("module._orig_mod.h.0.attn.c_attn.weight")
        'h.0.attn.c_attn.weight'
    """
    return ".".join(word for word in name.split(".") if word not in _WRAPPERS)


def is_norm(word: str) -> bool:
    """Tell whether a module is a norm, by its name.

    Args:
        word: the last word of the module's name.

    Returns:
        True where it is.

    Example:
        >>> is_norm("input_layernorm"), is_norm("ln_1"), is_norm("up_proj")
        (True, True, False)
    """
    return bool(_NORM.search(word))


def is_recurrent(leaf: str) -> bool:
    """Tell whether a parameter is a matrix of a recurrent cell (LSTM, GRU, tanh), by PyTorch's names for them.

    Args:
        leaf: the last word of its name.

    Returns:
        True where it is.

    Example:
        >>> is_recurrent("weight_hh_l0"), is_recurrent("weight_ih"), is_recurrent("weight_hr_l0")
        (True, True, False)
    """
    return bool(_RECURRENT.match(leaf))


def block_of(name: str) -> int | None:
    """Find the number of the block that holds a weight.

    Args:
        name: dotted name of a weight.

    Returns:
        The first number with at least a module and a parameter behind it; None outside numbered blocks.

    Example:
        >>> block_of("encoder.layer.11.attention.self.query.weight"), block_of("net.3.weight")
        (11, None)
    """
    words = plain_name(name).split(".")
    return next((int(word) for word in words[:-2] if word.isdigit()), None)


@dataclass(frozen=True)
class Names:
    """All names of a model, for the few roles that only neighbours tell (`w1` is a gate beside a `w3`).

    Args:
        children: words that follow each prefix.
    """

    children: dict[str, set[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        """Index names by their prefixes.

        Args:
            names: dotted names of all weights.

        Returns:
            The index.
        """
        index = cls()
        for name in names:
            words = plain_name(name).split(".")
            for at, word in enumerate(words):
                index.children.setdefault(".".join(words[:at]), set()).add(word)
        return index

    def beside(self, words: list[str]) -> set[str]:
        """Look up the neighbours of a module.

        Args:
            words: the words of its name.

        Returns:
            Names of modules and parameters with the same parent, its own included.
        """
        return self.children.get(".".join(words[:-1]), set())


def role_of(name: str, names: Names) -> str:
    """Tell what a weight is for by its name and its neighbours' names.

    Args:
        name: dotted name of the weight.
        names: all names of the model.

    Returns:
        `head`, `embedding`, `norm`, `lora`, one of `ATTENTION_ROLES` or `MLP_ROLES`, `router`, `recurrent`, or
        `other`.

    Example:
        >>> role_of("bert.encoder.layer.0.attention.output.dense.weight", Names())
        'o'
        >>> role_of("bert.encoder.layer.0.output.dense.weight", Names())
        'down'
    """
    words = plain_name(name).split(".")
    if is_recurrent(words[-1]):
        return "recurrent"
    own = words[:-1] if words[-1] == "weight" else words
    while own and own[-1].isdigit():  # a Sequential's number is no name: to_out.0, mlp.2
        own = own[:-1]
    if not own:
        return "other"
    inside = block_of(name) is not None
    lowered = [word.lower() for word in own]
    return _special_role(lowered, inside) or _block_role(own, lowered, names)


def _special_role(words: list[str], inside: bool) -> str:
    if any(word.startswith(("lora_", "adapter")) for word in words):
        return "lora"
    if not inside and (any(word in _HEADS or word.endswith("_head") for word in words) or words == ["output"]):
        return "head"
    if not inside and words == ["model", "output"]:
        return "head"
    if any(_EMBEDDING.search(word) for word in (words[-1:] if inside else words)):
        return "embedding"
    return "norm" if is_norm(words[-1]) else ""


def _block_role(own: list[str], words: list[str], names: Names) -> str:
    leaf, context = words[-1], _context(words)
    if leaf == "dense" and context == "mlp":
        return "up" if "intermediate" in words else "down"
    if leaf in _PLAINLY_ATTENTION and context != "mlp":
        context = "attention"
    elif leaf in _PLAINLY_MLP and context != "attention":
        context = "mlp"
    elif not context and leaf in _ATTENTION_LEAF and _is_attention(names.beside(own)):
        context = "attention"
    if context == "attention":
        return "kv" if leaf == "c_attn" and "crossattention" in words else _ATTENTION_LEAF.get(leaf, "attention")
    return _mlp_role(own, words, names) if context == "mlp" else "other"


# Attention under another name (`sa`, `mixer`) is told by what stands side by side in it.
def _is_attention(beside: set[str]) -> bool:
    leaves = {leaf.lower() for leaf in beside}
    roles = {_ATTENTION_LEAF.get(leaf) for leaf in leaves}
    return {"q", "k", "v"} <= roles or any(_ATTENTION_LEAF[leaf] == "qkv" for leaf in leaves & _PLAINLY_ATTENTION)


def _context(words: list[str]) -> str:
    # What stands before the block's number names the model, not the layer.
    first = next((at for at, word in enumerate(words) if word.isdigit()), 0)
    for word in reversed(words[first:-1]):
        if _WORD_ATTENTION.search(word):
            return "attention"
        # BERT's attention.output.dense: `output` alone says nothing until the word before it is known.
        if _WORD_MLP.search(word) and not (word == "output" and any(map(_WORD_ATTENTION.search, words[:-1]))):
            return "mlp"
    return ""


def _mlp_role(own: list[str], words: list[str], names: Names) -> str:
    leaf, beside = words[-1], names.beside(own)
    role = _MLP_LEAF.get(leaf, "mlp")
    if leaf == "w1" and "w3" not in beside:
        role = "up"
    if leaf == "gate" and not beside & {"up", "up_proj"}:
        role = "router"
    is_expert = any(word in {"experts", "expert"} for word in words[:-1])
    return f"expert_{role}" if is_expert and role != "router" else role
