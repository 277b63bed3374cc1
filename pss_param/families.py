# SPDX-License-Identifier: Apache-2.0
r"""How the families of models pack their weights, and how they draw them, from the facts of a `config.json`.

Packing cannot be seen in a tensor: the same `(3 n, n)` may be three blocks (Phi-3, ViT) or interleaved head
by head (GPT-NeoX, BLOOM). The config's `model_type` tells. Where it is unknown, a fused weight is taken as
the one matrix that it also is.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pss_param.errors import ArgumentError
from pss_param.matricize import (
    LINEAR,
    TRANSPOSED,
    Matricization,
    by_heads,
    experts,
    interleaved,
    stacked,
)

_INTERLEAVED = frozenset({"gpt_neox", "gpt_neox_japanese", "bloom", "falcon", "persimmon", "gpt_bigcode"})
_CONV1D = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_EXPERTS_IN_OUT = frozenset({"gpt_oss", "llama4", "llama4_text", "aria", "aria_text", "openai_privacy_filter"})
_EXPERTS_ALTERNATE = frozenset({"gpt_oss", "openai_privacy_filter"})
_T5 = frozenset({"t5", "mt5", "umt5", "longt5"})


@dataclass(frozen=True)
class Family:
    """The facts of a model that its tensors do not show. Zero or empty means unknown.

    Args:
        model_type: as in `config.json`.
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: rows of q per head.
        hidden: width of the residual stream.
        std: standard deviation that the family draws its weights with.
        config: everything else.
    """

    model_type: str = ""
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    hidden: int = 0
    std: float | None = None
    config: Mapping[str, Any] | None = None


def family_of(config: Mapping[str, Any] | None, name: str = "") -> Family:
    """Read the facts of a family from the content of a `config.json`.

    Args:
        config: the parsed file, or `model.config.to_dict()`; None when there is none.
        name: a weight's name, which picks the section of a model with several parts (text, vision, audio).

    Returns:
        What could be read.

    Example:
        >>> family_of({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}).head_dim
        16
    """
    if not config:
        return Family()
    facts = _section(config, name)
    hidden = _first(facts, "hidden_size", "n_embd", "d_model", "dim")
    heads = _first(facts, "num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads")
    kv_heads = _first(facts, "num_key_value_heads", "num_kv_heads", "n_kv_heads") or heads
    head_dim = _first(facts, "head_dim", "d_kv") or (hidden // heads if heads else 0)
    std = facts.get("initializer_range", facts.get("init_std"))
    std = float(std) if isinstance(std, (int, float)) and std > 0 else None
    return Family(str(facts.get("model_type", "")), heads, kv_heads, head_dim, hidden, std, facts)


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    lowered = name.lower()
    for word in ("vision", "visual", "audio"):
        if word in lowered and isinstance(config.get(f"{word.replace('visual', 'vision')}_config"), Mapping):
            return dict(config[f"{word.replace('visual', 'vision')}_config"])
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(key), Mapping) and config[key]:
            return {**config, **config[key]}
    return config


def _first(facts: Mapping[str, Any], *keys: str) -> int:
    return next((int(facts[key]) for key in keys if isinstance(facts.get(key), int)), 0)


@dataclass(frozen=True)
class Request:
    """What a matricization is asked for.

    Args:
        name: dotted name of the weight, for messages.
        role: its role.
        shape: its shape.
        transposed: stored `(in, out)`.
        per_head: attention weights as a batch of one matrix per head.
        only: the parts of a fused weight to work on; empty means all.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    transposed: bool = False
    per_head: bool = False
    only: tuple[str, ...] = ()


def stores_in_out(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether a checkpoint's `c_attn`, `c_fc`, `c_proj` are Hugging Face's `Conv1D`, stored `(in, out)`.

    Args:
        family: facts from the config.
        shapes: shapes by name; without a config, a wide `c_attn` or `c_fc` gives `Conv1D` away.

    Returns:
        True for GPT-2 as transformers writes it, False for GPT-2 made of `Linear` (nanoGPT).
    """
    if family.model_type:
        return family.model_type in _CONV1D
    wide = [shape for name, shape in shapes.items() if name.endswith(("c_attn.weight", "c_fc.weight"))]
    return bool(wide) and all(len(shape) == 2 and shape[1] > shape[0] for shape in wide)


def matricize_projection(request: Request, family: Family) -> Matricization:
    """Unpack a two-dimensional weight of a block.

    Args:
        request: what is asked for.
        family: facts from the config.

    Returns:
        One matrix, or the parts of a fused weight; the plain matrix where the packing is unknown.

    Raises:
        ArgumentError: matrices per head are asked for and the number of heads is unknown.
    """
    if request.role in {"q", "k", "v", "o", "qkv", "kv"}:
        if request.per_head and not family.head_dim:
            raise ArgumentError(
                f"per_head needs the number of heads, unknown for {request.name}; "
                "pass the config.json of the model or per_head=False"
            )
        return _attention(request, family)
    if request.role in {"gate_up", "expert_gate_up"} and not request.transposed and request.shape[0] % 2 == 0:
        return stacked({"gate": request.shape[0] // 2, "up": request.shape[0] // 2})
    return TRANSPOSED if request.transposed else LINEAR


def _attention(request: Request, family: Family) -> Matricization:
    head_dim = family.head_dim if request.per_head else None
    if request.role in {"qkv", "kv"}:
        return _fused(request, family)
    if head_dim is None:
        return TRANSPOSED if request.transposed else LINEAR
    along = int(request.role == "o") ^ int(request.transposed)
    if request.shape[along] % head_dim:
        raise ArgumentError(
            f"per_head needs a whole number of heads of {head_dim} in {request.name} {request.shape}; "
            "exclude it or use per_head=False"
        )
    return by_heads(head_dim, of_input=request.role == "o", transposed=request.transposed)


def _fused(request: Request, family: Family) -> Matricization:
    rows = request.shape[1 if request.transposed else 0]
    leaf = f".{request.name}".rsplit(".", 2)[-2]
    if leaf == "query_key_value" or family.model_type in _INTERLEAVED:
        found = _interleaved(request, family, rows)
    else:
        found = _stacked(request, family, rows)
    if found is None and request.per_head:
        raise ArgumentError(
            f"per_head cannot tell the parts of {request.name} {request.shape}; exclude it or use per_head=False"
        )
    return found or (TRANSPOSED if request.transposed else LINEAR)


def _stacked(request: Request, family: Family, rows: int) -> Matricization | None:
    q, kv = family.heads * family.head_dim, family.kv_heads * family.head_dim
    columns = request.shape[0 if request.transposed else 1]
    if request.role == "kv":
        parts = {"k": rows // 2, "v": rows // 2} if rows % 2 == 0 else {}
    elif q and rows == q + 2 * kv:
        parts = {"q": q, "k": kv, "v": kv}
    else:
        parts = {"q": columns, "k": columns, "v": columns} if rows == 3 * columns else {}
    head_dim = family.head_dim if request.per_head else None
    return stacked(parts, transposed=request.transposed, head_dim=head_dim, only=request.only) if parts else None


def _interleaved(request: Request, family: Family, rows: int) -> Matricization | None:
    facts, heads, d = family.config or {}, family.heads, family.head_dim
    if family.model_type not in _INTERLEAVED or not heads:
        return None
    if family.model_type == "falcon" and facts.get("new_decoder_architecture"):
        kv = family.kv_heads
        group = {"q": heads // kv, "k": 1, "v": 1}
        return (
            interleaved(kv, group, per_head=request.per_head, only=request.only)
            if rows == (heads + 2 * kv) * d
            else None
        )
    if facts.get("multi_query") and family.model_type in {"falcon", "gpt_bigcode"}:
        head_dim = d if request.per_head else None
        return (
            stacked({"q": heads * d, "k": d, "v": d}, head_dim=head_dim, only=request.only)
            if rows == (heads + 2) * d
            else None
        )
    return interleaved(heads, per_head=request.per_head, only=request.only) if rows == 3 * heads * d else None


def matricize_experts(request: Request, family: Family) -> Matricization:
    """Unpack a stack of experts.

    Args:
        request: what is asked for; the shape is `(experts, out, in)` or `(experts, in, out)`.
        family: facts from the config: the type, else the hidden size, tells which axis is the output.

    Returns:
        One matrix per expert, and the parts gate and up where they are fused.
    """
    _, first, second = request.shape
    transposed = family.model_type in _EXPERTS_IN_OUT
    if request.role != "expert_gate_up":
        if not family.model_type and family.hidden and first != second:
            transposed = (request.role == "expert_down") == (second == family.hidden)
        return experts(transposed=transposed)
    if not transposed and family.hidden and first == family.hidden != second:
        transposed = True
    fused = second if transposed else first
    if fused % 2:
        return experts(transposed=transposed)
    return experts(
        {"gate": fused // 2, "up": fused // 2},
        transposed=transposed,
        alternating=family.model_type in _EXPERTS_ALTERNATE,
    )


def init_std(role: str, name: str, family: Family) -> float | None:
    r"""Standard deviation that a Hugging Face family draws a weight with.

    `initializer_range` for all, but: GPT-2 divides its `c_proj` by `sqrt(2 n_layer)` (two residual layers in
    each block), and T5 scales by the width of the input (`q` also by that of the head), times
    `initializer_factor`.

    Args:
        role: role of the weight.
        name: its dotted name.
        family: facts from the config.

    Returns:
        The standard deviation, or None where the config does not tell.

    Example:
        >>> gpt2 = family_of({"model_type": "gpt2", "n_layer": 8, "initializer_range": 0.02})
        >>> init_std("o", "h.0.attn.c_proj.weight", gpt2)
        0.005
    """
    facts = family.config or {}
    if family.model_type in _T5:
        return _t5_std(role, family)
    if (
        family.model_type in {"gpt2", "decision_transformer", "gpt_bigcode"}
        and name.endswith("c_proj.weight")
        and family.std
    ):
        layers = _first(facts, "n_layer", "num_hidden_layers")
        return family.std / math.sqrt(2 * layers) if layers else family.std
    return family.std


def _t5_std(role: str, family: Family) -> float | None:
    facts = family.config or {}
    factor, inner = float(facts.get("initializer_factor", 1.0)), family.heads * family.head_dim
    fan_in = {
        "q": family.hidden * family.head_dim,
        "k": family.hidden,
        "v": family.hidden,
        "o": inner,
        "gate": family.hidden,
        "up": family.hidden,
        "down": _first(facts, "d_ff"),
        "embedding": 1,
        "head": 1,
    }.get(role, 0)
    return factor / math.sqrt(fan_in) if fan_in else None
