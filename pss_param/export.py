# SPDX-License-Identifier: Apache-2.0
r"""Plain weights: what code that has never heard of this package can load.

A guarded model's own ``state_dict`` is plain already. Keys such as ``fc.parametrizations.weight.original`` come
from views that were registered by hand through stock :mod:`torch.nn.utils.parametrize`.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pss_param.errors import ArgumentError, CheckpointError
from pss_param.slot import occupied_slots
from pss_param.view import SmoothingView

__all__ = ["export", "plain_state_dict"]

T = TypeVar("T")
_PARAMETRIZED = re.compile(r"(?P<module>(?:.+\.)?)parametrizations\.(?P<name>[^.]+)\.(?P<rest>.+)")


def plain_state_dict(state_dict: Mapping[str, T]) -> dict[str, T]:
    r"""Give the stored weights of hand-registered views their plain names; values are passed on as they are.

    ``X.parametrizations.weight.original`` becomes ``X.weight`` at the same place in the order. A view keeps
    exactly that one tensor. Several originals, or anything else stored beside one, belong to another
    parametrization, whose weight is the result of a computation. One that keeps a single original and nothing
    else cannot be told from a view by its keys.

    Args:
        state_dict: The tensors of a model, or anything else, by name.

    Returns:
        A new dictionary with plain names.

    Raises:
        CheckpointError: If a key belongs to another parametrization, or two keys get the same name.

    Example:
        >>> plain_state_dict({"fc.bias": 1, "fc.parametrizations.weight.original": 2})
        {'fc.bias': 1, 'fc.weight': 2}
    """
    plain: dict[str, T] = {}
    for key, value in state_dict.items():
        match = _PARAMETRIZED.fullmatch(key)
        name = key
        if match is not None:
            name = match["module"] + match["name"]
            if match["rest"] != "original":
                raise CheckpointError(
                    f"{key} belongs to another parametrization of {name} (such as weight_norm), whose weight has "
                    "to be computed; load the model and use pss_param.export(model, path)"
                )
        if name in plain:
            raise CheckpointError(f"the checkpoint holds {name} twice, plain and parametrized; keep one of the two")
        plain[name] = value
    return plain


def export(model: nn.Module, path: str | os.PathLike[str]) -> None:
    r"""Write the weights that the model computes with, under plain names, as one safetensors file.

    Weights of open gates are written smoothed, parametrized ones (ours and others') as they act, buffers as they
    are. The model is not changed. Tied weights are written once, under the first name in the model's order, as
    trainers expect.

    Args:
        model: Any module, guarded or not.
        path: The file to write; an existing one is replaced.

    Raises:
        ArgumentError: If nothing is there to write, or a tensor has no values (meta device).

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> path = os.path.join(tempfile.mkdtemp(), "weights.safetensors")
        >>> layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
        >>> export(layer, path)
        >>> sorted(load_file(path))
        ['bias', 'weight']
    """
    with torch.no_grad():
        tensors = dict(_effective(model))
    if not tensors:
        raise ArgumentError(f"{type(model).__name__} has no weights to export")
    empty = [name for name, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise ArgumentError(f"{empty[0]} is on the meta device and has no values; load the weights first")
    save_file(tensors, os.fspath(path), metadata={"format": "pt"})


def _effective(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    ours = {(id(slot.module), slot.name): view for slot, view in occupied_slots(model)}
    plain = {
        key: value for key, value in model.state_dict(keep_vars=True).items() if ".parametrizations." not in f".{key}"
    }
    seen: set[tuple[object, ...]] = set()
    for path, module in model.named_modules():
        for name in _foreign(module, ours):
            plain[f"{path}.{name}" if path else name] = getattr(module, name)
    for key, value in plain.items():
        if isinstance(value, Tensor):
            place = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
            if value.numel() and not value.is_meta and place in seen:
                continue
            seen.add(place)
            # Views of one storage would be refused by the format.
            yield key, value.detach().contiguous().clone()


def _foreign(module: nn.Module, ours: Mapping[tuple[int, str], SmoothingView]) -> list[str]:
    lists = module._modules.get("parametrizations")
    if not isinstance(lists, nn.ModuleDict):
        return []
    return [name for name, _ in lists.named_children() if (id(module), name) not in ours]
