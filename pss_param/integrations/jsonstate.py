# SPDX-License-Identifier: Apache-2.0
r"""States as JSON, bit for bit: the Hugging Face Trainer keeps what its callbacks save in a JSON file."""

import base64
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pss_param.errors import CheckpointError

__all__ = ["from_json", "to_json"]

_KEYS = frozenset({"dtype", "shape", "base64"})


def to_json(value: Any) -> Any:
    r"""Replace every tensor in a nest of dictionaries by its dtype, its shape and its bytes in base 64.

    Args:
        value: A tensor, a number, a text, None, or a dictionary of these with texts as keys.

    Returns:
        The same nest without tensors.

    Example:
        >>> to_json({"count": torch.tensor(3)})
        {'count': {'dtype': 'int64', 'shape': [], 'base64': 'AwAAAAAAAAA='}}
    """
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    text = base64.b64encode(raw).decode("ascii")
    return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "base64": text}


def from_json(value: Any) -> Any:
    r"""Undo :func:`to_json`.

    Args:
        value: What it returned, after a way through JSON.

    Returns:
        The nest with its tensors, on the CPU.

    Raises:
        CheckpointError: If a tensor's bytes do not fit its shape.

    Example:
        >>> state = {"average": torch.tensor(0.1, dtype=torch.float64), "steps": 4}
        >>> from_json(to_json(state)) == state
        True
    """
    if not isinstance(value, Mapping):
        return value
    if set(value) != _KEYS:
        return {key: from_json(item) for key, item in value.items()}
    try:
        dtype = getattr(torch, str(value["dtype"]))
        raw = bytearray(base64.b64decode(value["base64"], validate=True))
        flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return flat.reshape(value["shape"]).clone()
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"a tensor of dtype {value['dtype']} and shape {value['shape']} in the guard's saved state is damaged "
            f"({error}); resume from another checkpoint, or remove the state to start the guard afresh"
        ) from error
