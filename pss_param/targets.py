# SPDX-License-Identifier: Apache-2.0
r"""Which weights are smoothed, and how each is unpacked, for a live model and for a checkpoint alike.

A *preset* chooses by role, `include` and `exclude` patterns add and remove by name; everything else is listed
as skipped, with the reason.

| preset | chooses |
|---|---|
| `linear` | every matrix inside the numbered blocks, routers of experts and convolutions too; recurrent ones anywhere |
| `attention` | q, k, v, o, fused or not |
| `qk` | q and k; of a fused weight only these rows |
| `mlp` | gate, up, down, dense and of experts |
| `all` | every matrix, embeddings and output head too |
| `none` | nothing but what `include` names |

A pattern is a glob (`fnmatch`, case-sensitive) on the dotted name; one that names a module stands for all in
it. What trainers put before a name (`module.`, `_orig_mod.`, `model.`) matches but is never needed:
`layers.0.*` and `model.layers.0.*` are the same. A pattern that matches nothing is an error, and so is an
`include` pattern that adds nothing because all it names cannot be smoothed (a vector, a frozen or quantised
weight). A tensor of three axes is taken as a stack of experts, one matrix for each index of the first axis, where
its name says so (`experts`) or an `include` pattern covers it.

In a model without numbered blocks (a plain MLP, a small convolutional network) `linear` takes every linear
and convolution weight but the embeddings and the output head. A matrix without a bias in a checkpoint where other
matrices have one may be an embedding under any name, and is left alone. The head is told by its name alone (`head`,
`lm_head`, `classifier`, `score`, ...): the last layer of a plain `nn.Sequential` is a target; exclude it by
name where it is a head.

What a checkpoint cannot tell: a kernel with one input channel may be depthwise, so it is skipped unless
included; groups of other convolutions are not seen, the kernel is one matrix; a transposed convolution looks
like a plain one, which has the same singular values when there is one group. Fused q/k/v whose packing needs
a missing `config.json` are taken as the one matrix that they also are.
"""

import math
from collections.abc import Collection, Hashable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from pss_param.errors import ArgumentError
from pss_param.families import (
    Family,
    Request,
    family_of,
    init_std,
    matricize_experts,
    matricize_projection,
    stores_in_out,
)
from pss_param.inspection import TensorInfo, Weight, inspect_model, inspect_tensors
from pss_param.matricize import Matricization, convolution
from pss_param.roles import Names, block_of, role_of
from pss_param.selection import PRESETS, Selection, Skipped, Target, TargetRules, matches, refuse_unmatched

__all__ = [
    "PRESETS",
    "Selection",
    "Skipped",
    "Target",
    "TargetRules",
    "TensorInfo",
    "select_parameters",
    "select_tensors",
]

MAYBE_A_TABLE = "a matrix without a bias, where others have one, may be an embedding; include it by name"
"""Why such a matrix outside numbered blocks is skipped."""

EXCLUDED = "excluded by"
"""How the reason begins why a weight is left that a user excluded."""

ONE_CHANNEL = "a kernel of one input channel may be depthwise; include it by name to take it as one matrix"
"""Why such a kernel is skipped."""

STACK = (
    "3-D: which matrices it acts as is unknown; include it by name to take it as a batch of them, one for each index "
    "of its first axis"
)
"""Why a tensor of three axes that is no stack of experts by its name is skipped."""

_NEVER_BY_PRESET = {
    "norm": "a normalisation weight",
    "lora": "a LoRA or adapter factor: smoothing one factor does not smooth the product",
}
_NOT_IN_BLOCKS = {"embedding": "an embedding", "head": "the output head"}
VAGUE_ROLES = frozenset({"other", "attention", "mlp", "embedding", "head"})
"""Roles that the place of a tensor tells, not its own name."""
_QK_PARTS = {"qkv": ("q", "k"), "kv": ("k",)}
_CONV1D_NAMES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})


def select_parameters(model: nn.Module, rules: TargetRules | None = None) -> Selection:
    """Choose among the parameters of a live model, by module type and name.

    Frozen and quantised parameters and those held by a foreign parametrization are skipped even if a glob
    covers them; an `include` pattern that covers nothing else raises. Heads, packing and initialisers come
    from the config of a Hugging Face model, if one is inside.

    Args:
        model: any module; DDP, compiled and FSDP wrappers may be around it.
        rules: which weights; default `TargetRules()`.

    Returns:
        Targets, and the rest with reasons. A preset or a pattern that matches nothing raises `ArgumentError`.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [target.name for target in select_parameters(model).targets]
        ['0.weight', '2.weight']
    """
    weights, config = inspect_model(model)
    return _Selector(weights, rules or TargetRules(), config).select()


def select_tensors(
    tensors: Mapping[str, TensorInfo],
    rules: TargetRules | None = None,
    config: Mapping[str, Any] | None = None,
) -> Selection:
    """Choose among the tensors of a checkpoint, by name, shape, dtype, and its `config.json` if there is one.

    Args:
        tensors: what the checkpoint holds.
        rules: which weights; default `TargetRules()`.
        config: content of `config.json`: number of heads, packing of fused weights, initialiser.

    Returns:
        Targets, and the rest with reasons. A preset or a pattern that matches nothing raises `ArgumentError`.

    Example:
        >>> import torch
        >>> names = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"]
        >>> tensors = {name: TensorInfo((8, 4), torch.float32) for name in names}
        >>> [(target.role, target.block) for target in select_tensors(tensors).targets]
        [('up', 0)]
        >>> select_tensors(tensors).skipped[0].reason
        "an embedding, not in preset 'linear'"
    """
    return _Selector(inspect_tensors(tensors), rules or TargetRules(), config).select()


def select_companions(model: nn.Module, guarded: Collection[str]) -> list[str]:
    """Name the parameters that learn as slowly as the guarded ones do: :mod:`pss_param.damping`.

    Args:
        model: any module.
        guarded: names of the guarded parameters.

    Returns:
        All others but embeddings and output heads, under whatever name these and the guarded ones are held too.

    Example:
        >>> from torch import nn
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)]), "head": nn.Linear(2, 2)})
        >>> select_companions(model, ["layers.0.weight"])
        ['layers.0.bias']
    """
    weights, _ = inspect_model(model)
    names = Names.of(weight.name for weight in weights)
    apart = {w.info.storage for w in weights if w.name in guarded or _role(w, names) in _NOT_IN_BLOCKS}
    return [w.name for w in weights if w.info.storage not in apart]


class _Selector:
    """One pass over the weights of one model."""

    def __init__(self, weights: list[Weight], rules: TargetRules, config: Mapping[str, Any] | None) -> None:
        self.weights, self.rules, self.config = weights, rules, config
        names = Names.of(weight.name for weight in weights)
        self.roles = {weight.name: _role(weight, names) for weight in weights}
        matrices = {weight.name.removesuffix("weight") for weight in weights if len(weight.info.shape) == 2}
        self.biased = matrices & {weight.name.removesuffix("bias") for weight in weights}
        self.transposed = stores_in_out(family_of(config), {weight.name: weight.info.shape for weight in weights})
        self.has_blocks = any(
            block_of(weight.name) is not None and not self._refusal(weight) and not self._kept_out(weight)
            for weight in weights
        )

    def select(self) -> Selection:
        chosen: dict[str, Target] = {}
        reasons: dict[str, str] = {}
        for weight in self.weights:
            outcome = self._refusal(weight) or self._left_out(weight) or self._target(weight)
            if isinstance(outcome, str):
                reasons[weight.name] = outcome
            else:
                chosen[weight.name] = outcome
        self._settle_tied(chosen, reasons)
        self._check_patterns(chosen, reasons)
        skipped = (Skipped(weight.name, reasons[weight.name]) for weight in self.weights if weight.name in reasons)
        return Selection(tuple(chosen[w.name] for w in self.weights if w.name in chosen), tuple(skipped))

    def _included(self, name: str) -> bool:
        return any(matches(name, pattern) for pattern in self.rules.include)

    def _excluded(self, name: str) -> str:
        return next((pattern for pattern in self.rules.exclude if matches(name, pattern)), "")

    # What no rule can make a target.
    def _refusal(self, weight: Weight) -> str:
        shape, role = weight.info.shape, self.roles[weight.name]
        if weight.obstacle:
            return weight.obstacle
        if weight.kind.startswith("conv"):
            return "depthwise: each kernel acts as a vector" if 1 in _convolution_sides(weight) else ""
        stack = len(shape) == 3 and (role.startswith("expert_") or self._included(weight.name))
        if not (len(shape) == 2 or stack):
            return STACK if len(shape) == 3 else f"{len(shape)}-D: which matrices it acts as is unknown"
        return "acts as a vector" if 1 in shape[-2:] else ""

    # What only `include` makes a target.
    def _kept_out(self, weight: Weight) -> str:
        role = self.roles[weight.name]
        if role in _NEVER_BY_PRESET:
            return _NEVER_BY_PRESET[role]
        if self.rules.preset != "all" and role in _NOT_IN_BLOCKS:
            return f"{_NOT_IN_BLOCKS[role]}, not in preset {self.rules.preset!r}"
        if weight.kind == "conv" and not weight.groups and weight.info.shape[1] == 1:
            return ONE_CHANNEL
        leaf = weight.name.rsplit(".", 1)[-1]
        named = weight.kind or leaf.endswith("weight") or role not in VAGUE_ROLES
        return "" if named else "a bare parameter of unknown use; include it by name to take it as a matrix"

    def _left_out(self, weight: Weight) -> str:
        pattern = self._excluded(weight.name)
        if pattern:
            return f"{EXCLUDED} {pattern!r}"
        if self._included(weight.name):
            return ""
        preset, role = self.rules.preset, self.roles[weight.name]
        if preset == "none":
            return "not included"
        if PRESETS[preset] and role not in PRESETS[preset]:
            return f"role {role!r} is not in preset {preset!r}"
        kept_out = self._kept_out(weight)
        inside = block_of(weight.name) is not None or role == "recurrent"
        if kept_out or preset == "all" or inside:
            return kept_out
        if self.has_blocks:
            return "outside the numbered blocks"
        return MAYBE_A_TABLE if self._may_be_a_table(weight) else ""

    def _may_be_a_table(self, weight: Weight) -> bool:
        unknown = not weight.kind and self.roles[weight.name] == "other"  # of a live model the module says what it is
        return unknown and bool(self.biased) and weight.name.removesuffix("weight") not in self.biased

    def _target(self, weight: Weight) -> Target | str:
        role, family = self.roles[weight.name], self._family(weight)
        only = () if self._included(weight.name) or self.rules.preset != "qk" else _QK_PARTS.get(role, ())
        matricization = self._matricize(weight, family, only)
        if only and not matricization.only:
            return (
                "fused q/k/v of unknown packing, q and k cannot be told from v; pass config.json or preset 'attention'"
            )
        own = self.config is None or weight.kind in {"in_proj", "recurrent"}
        std = weight.std if own else init_std(role, weight.name, family)
        return Target(weight.name, role, matricization, std, block_of(weight.name))

    def _family(self, weight: Weight) -> Family:
        if weight.heads:
            embed = weight.info.shape[1]
            return Family(heads=weight.heads, kv_heads=weight.heads, head_dim=embed // weight.heads, hidden=embed)
        return family_of(self.config, weight.name)

    def _matricize(self, weight: Weight, family: Family, only: tuple[str, ...]) -> Matricization:
        shape, role = weight.info.shape, self.roles[weight.name]
        if weight.kind.startswith("conv"):
            return convolution(len(shape), max(weight.groups, 1), transposed=weight.kind == "conv_transposed")
        transposed = weight.kind == "transposed" or (
            not weight.kind and self.transposed and f".{weight.name}".rsplit(".", 2)[-2] in _CONV1D_NAMES
        )
        request = Request(weight.name, role, shape, transposed, self.rules.per_head, only)
        return matricize_experts(request, family) if len(shape) == 3 else matricize_projection(request, family)

    # Never half-smoothed: all names of one Parameter, or none.
    def _settle_tied(self, chosen: dict[str, Target], reasons: dict[str, str]) -> None:
        for names in self._ties():
            held = [chosen.pop(name) for name in names if name in chosen]
            barred = any(self._excluded(name) for name in names)
            if held and self.rules.tied == "share" and not barred:
                chosen[names[0]] = replace(held[0], name=names[0], block=block_of(names[0]), aliases=tuple(names[1:]))
                for name in names:
                    reasons.pop(name, None)
                continue
            for target in held:
                others = ", ".join(name for name in names if name != target.name)
                reasons[target.name] = f"tied: the same Parameter as {others}" + (
                    ", which is excluded" if barred else ""
                )

    def _ties(self) -> list[list[str]]:
        groups: dict[Hashable, list[str]] = {}
        for weight in self.weights:
            if weight.info.storage is not None:
                groups.setdefault((weight.info.storage, weight.info.shape), []).append(weight.name)
        return [names for names in groups.values() if len(names) > 1]

    def _check_patterns(self, chosen: Mapping[str, Target], reasons: Mapping[str, str]) -> None:
        names = [weight.name for weight in self.weights]
        for kind, patterns in (("include", self.rules.include), ("exclude", self.rules.exclude)):
            for pattern in patterns:
                if not any(matches(name, pattern) for name in names):
                    refuse_unmatched(kind, pattern, names)
        for pattern in self.rules.include:
            matched = [name for name in names if matches(name, pattern)]
            if all(name in reasons for name in matched):
                raise ArgumentError(f"include pattern {pattern!r} adds nothing: {matched[0]} is {reasons[matched[0]]}")
        if not chosen:
            raise ArgumentError(self._nothing(reasons))

    def _nothing(self, reasons: Mapping[str, str]) -> str:
        if not reasons:
            return "there is no weight to choose from: the model or checkpoint has no parameters"
        seen = sorted({self.roles[weight.name] for weight in self.weights if not self._refusal(weight)})
        # The most telling example: a matrix of a role that was asked for, else any matrix.
        matrices = [weight.name for weight in self.weights if len(weight.info.shape) > 1] or list(reasons)
        asked = [name for name in matrices if self.roles[name] in PRESETS[self.rules.preset]]
        example = (asked or matrices)[0]
        return (
            f"preset {self.rules.preset!r} selects no weight; roles of the matrices here: {', '.join(seen) or 'none'}; "
            f"{example}: {reasons[example]}; use another preset ({', '.join(PRESETS)}) or include patterns"
        )


def _role(weight: Weight, names: Names) -> str:
    role = role_of(weight.name, names)
    if weight.kind in {"embedding", "norm"}:
        return weight.kind
    return "conv" if weight.kind.startswith("conv") and role not in {"head", "embedding", "lora"} else role


def _convolution_sides(weight: Weight) -> tuple[int, int]:
    first, *rest = weight.info.shape
    return first // max(weight.groups, 1), math.prod(rest)
