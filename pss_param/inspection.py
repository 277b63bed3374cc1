# SPDX-License-Identifier: Apache-2.0
r"""What is known of each weight before any is chosen: from live modules, or from names and shapes on disk."""

import math
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from pss_param.roles import is_recurrent

_FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
_QUANTISATION = re.compile(
    r"(^|[._])(scales?|scale_inv|zeros?|zero_point|absmax|qweight|qzeros|g_idx|scb|quant_map|weight_packed|weight_shape)$"
)
_QUANTISERS = ("bitsandbytes", "torchao", "optimum.quanto", "hqq", "gptqmodel", "compressed_tensors")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True)
class TensorInfo:
    """What a checkpoint says about one tensor without reading it.

    Args:
        shape: its shape.
        dtype: its dtype.
        storage: anything hashable that is equal for tensors in the same memory; tensors of one shape that
            share it are tied.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: Hashable = None


@dataclass(frozen=True)
class Weight:
    """One named tensor and what is known of it.

    Args:
        name: dotted name as the model or the checkpoint spells it.
        info: shape, dtype, storage.
        kind: `linear`, `transposed`, `conv`, `conv_transposed`, `recurrent`, `embedding`, `norm`, `in_proj`, or empty
            for unknown.
        groups: groups of a convolution; 0 for unknown.
        heads: attention heads, 0 for unknown.
        std: standard deviation of its initialiser, where the module tells.
        obstacle: why it can never be a target; empty when it can.
    """

    name: str
    info: TensorInfo
    kind: str = ""
    groups: int = 0
    heads: int = 0
    std: float | None = None
    obstacle: str = ""


def inspect_tensors(tensors: Mapping[str, TensorInfo]) -> list[Weight]:
    """Describe the tensors of a checkpoint, by name, shape and dtype alone.

    Args:
        tensors: what the checkpoint holds.

    Returns:
        One description each, in order.
    """
    return [_stored_weight(name, info, tensors) for name, info in tensors.items()]


def _stored_weight(name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> Weight:
    kind = _kind_by_shape(name, info)
    std = _stored_std(name, info, tensors, kind) if all(info.shape) else None
    return Weight(name, info, kind, std=std, obstacle=obstacle(name, info))


def _stored_std(name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo], kind: str) -> float | None:
    # Only nn.MultiheadAttention has a parameter of this name, and it always draws it with xavier_uniform_.
    if kind == "in_proj":
        return math.sqrt(2 / sum(info.shape))
    if kind != "recurrent":
        return None
    # All of a cell is drawn from +-1/sqrt(hidden), and the matrix of the state has so many columns.
    prefix, dot, leaf = name.rpartition(".")
    of_state = tensors.get(prefix + dot + leaf.replace("weight_ih", "weight_hh"), info)
    return 1 / math.sqrt(3 * of_state.shape[-1]) if of_state.shape and of_state.shape[-1] else None


def _kind_by_shape(name: str, info: TensorInfo) -> str:
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "in_proj_weight" and len(info.shape) == 2:
        return "in_proj"
    if is_recurrent(leaf) and len(info.shape) == 2:
        return "recurrent"
    return "conv" if leaf == "weight" and 3 <= len(info.shape) <= 5 and "expert" not in name else ""


def inspect_model(model: nn.Module) -> tuple[list[Weight], Mapping[str, Any] | None]:
    """Describe the parameters of a live model, and find its Hugging Face config if it has one.

    Args:
        model: any module; wrappers such as DDP included.

    Returns:
        One description for each name (a parameter under two names appears twice), and the config's content.
    """
    xavier = {id(part) for whole in model.modules() if isinstance(whole, nn.Transformer) for part in whole.modules()}
    heads = {
        id(part): whole.num_heads
        for whole in model.modules()
        if isinstance(whole, nn.MultiheadAttention)
        for part in whole.modules()
    }
    weights = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{prefix}.{leaf}" if prefix else leaf
            weight = _live_weight(name, leaf, module, parameter, id(module) in xavier)
            weights.append(replace(weight, heads=heads.get(id(module), 0)))
    return weights, _config_of(model)


def _config_of(model: nn.Module) -> Mapping[str, Any] | None:
    for module in model.modules():
        to_dict = getattr(getattr(module, "config", None), "to_dict", None)
        if callable(to_dict):
            content = to_dict()
            return content if isinstance(content, Mapping) else None
    return None


def _live_weight(name: str, leaf: str, module: nn.Module, parameter: nn.Parameter, xavier: bool) -> Weight:
    if isinstance(parameter, nn.UninitializedParameter):
        info = TensorInfo((), parameter.dtype, id(parameter))
        return Weight(name, info, obstacle="lazy: its shape is unknown before the first forward")
    info = TensorInfo(tuple(parameter.shape), parameter.dtype, id(parameter))
    kind = _kind_of(module, leaf)
    groups = int(getattr(module, "groups", 0)) if kind.startswith("conv") else 0
    std = _std_of(module, kind, info.shape, xavier)
    return Weight(name, info, kind, groups, 0, std, _live_obstacle(name, leaf, module, parameter, info))


def _kind_of(module: nn.Module, leaf: str) -> str:
    if isinstance(module, nn.MultiheadAttention):
        return "in_proj" if leaf == "in_proj_weight" else "linear"
    if leaf != "weight":
        return "recurrent" if is_recurrent(leaf) else ""
    # By the name of any base: transformers may be absent, and a parametrized module has a subclass as its type.
    if hasattr(module, "nf") and any(base.__name__ == "Conv1D" for base in type(module).__mro__):
        return "transposed"
    table = {
        "embedding": (nn.Embedding, nn.EmbeddingBag),
        "conv": _CONVOLUTIONS,
        "conv_transposed": _TRANSPOSED,
        "norm": _NORMS,
        "linear": (nn.Linear,),
    }
    return next((kind for kind, types in table.items() if isinstance(module, types)), "")


def _std_of(module: nn.Module, kind: str, shape: tuple[int, ...], xavier: bool) -> float | None:
    # Linear and convolutions: kaiming_uniform_(a=sqrt(5)), i.e. uniform in +-1/sqrt(fan_in).
    # Attention, and all of nn.Transformer: xavier_uniform_.
    if len(shape) < 2 or 0 in shape:
        return None
    if kind == "embedding":
        return 1.0
    if isinstance(module, nn.MultiheadAttention) or (xavier and kind == "linear"):
        return math.sqrt(2 / sum(shape))
    if kind in {"linear", "conv", "conv_transposed"}:
        return 1 / math.sqrt(3 * math.prod(shape[1:]))
    if kind == "recurrent" and isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return 1 / math.sqrt(3 * module.hidden_size)
    return None


def _live_obstacle(name: str, leaf: str, module: nn.Module, parameter: nn.Parameter, info: TensorInfo) -> str:
    found = obstacle(name, info)
    if found:
        return found
    if type(parameter).__module__.startswith(_QUANTISERS) or type(module).__module__.startswith(_QUANTISERS):
        return f"quantised: {type(parameter).__module__}.{type(parameter).__name__}"
    if not parameter.requires_grad:
        return "frozen: requires_grad is False"
    if leaf in {"weight_g", "weight_v", "weight_orig"}:
        return "held by an older hook (weight_norm, spectral_norm, pruning); remove it first"
    return ""


def obstacle(name: str, info: TensorInfo) -> str:
    """Say why a tensor can never be smoothed, whatever the rules.

    Args:
        name: its dotted name.
        info: its shape and dtype.

    Returns:
        The reason, or an empty string.

    Example:
        >>> obstacle("embeddings.position_ids", TensorInfo((1, 512), torch.int64))
        'dtype int64 is not a floating type'
    """
    kind = str(info.dtype).removeprefix("torch.")
    if _QUANTISATION.search(name.lower()):
        return "quantisation data, not a weight"
    if info.dtype.is_floating_point and info.dtype not in _FLOATS:
        return f"quantised: {kind} weights have a scale apart; dequantise first"
    if info.dtype not in _FLOATS:
        return f"dtype {kind} is not a floating type"
    if ".parametrizations." in f".{name}":
        return "held by a parametrization; remove it, or `pss-repair export` the checkpoint, first"
    if len(info.shape) < 2:
        return f"{len(info.shape)}-D: a vector has no singular directions"
    if name.lower().endswith("bias"):
        return "a bias, not a matrix"
    return "empty" if 0 in info.shape else ""
