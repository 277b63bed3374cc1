# SPDX-License-Identifier: Apache-2.0
r"""Which number of an optimizer's state belongs to which parameter.

``torch.optim`` numbers parameters in the order of its groups and writes no names. The order is known to whoever
made the optimizer (:func:`write_param_order`), or follows from the model where a known trainer made it
(:func:`order_from_config`).
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pss_param.checkpoint.write import write_file
from pss_param.errors import ArgumentError, CheckpointError
from pss_param.meta_model import trained_parameters

SCHEMA = "pss-param/param-order/1"
MAX_FILE = 100_000_000


@dataclass(frozen=True)
class ParamOrder:
    r"""Names and shapes of an optimizer's parameters, in the order of its numbers.

    Args:
        names: dotted names, one per number.
        shapes: their shapes.
        origin: where the order was taken from, for messages.
        checked: whether the shapes are known and to be compared.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    origin: str
    checked: bool = True


def write_param_order(
    model: nn.Module, optimizer: torch.optim.Optimizer, path: str | os.PathLike[str], *, force: bool = False
) -> None:
    r"""Write down which parameter has which number in an optimizer's state, for ``pss-repair --param-order``.

    Args:
        model: holds the parameters; wrapped or not.
        optimizer: made from parameters of the model.
        path: the JSON file to write.
        force: whether an existing file may be replaced.

    Raises:
        ArgumentError: a parameter of the optimizer is not in the model.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(2, 2)
        >>> path = Path(tempfile.mkdtemp()) / "order.json"
        >>> write_param_order(model, torch.optim.SGD([model.bias, model.weight]), path)
        >>> read_param_order(path).names
        ('bias', 'weight')
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rows = []
    for number, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        if id(parameter) not in names:
            raise ArgumentError(
                f"parameter {number} of the optimizer, shape {tuple(parameter.shape)}, is not in the model; "
                "pass the model that the optimizer was made for"
            )
        rows.append({"name": names[id(parameter)], "shape": list(parameter.shape)})
    text = json.dumps({"schema": SCHEMA, "parameters": rows}, indent=1) + "\n"
    write_file(Path(path), text.encode(), force)


def read_param_order(path: str | os.PathLike[str]) -> ParamOrder:
    r"""Read what :func:`write_param_order` wrote.

    Args:
        path: the file.

    Returns:
        The order.

    Raises:
        CheckpointError: it is something else.
    """
    where = Path(path)
    if not where.is_file() or where.stat().st_size > MAX_FILE:
        raise CheckpointError(f"{where} is no file of pss_param.write_param_order")
    try:
        content = json.loads(where.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is no JSON ({str(error)[:80]})") from None
    rows = content.get("parameters") if isinstance(content, dict) and content.get("schema") == SCHEMA else None
    if not isinstance(rows, list) or not all(map(_is_row, rows)):
        raise CheckpointError(f"{where} is no file of the schema {SCHEMA}; make it with pss_param.write_param_order")
    names = tuple(row["name"] for row in rows)
    if len(set(names)) < len(names):
        raise CheckpointError(f"{where} names a parameter twice; make it anew with pss_param.write_param_order")
    return ParamOrder(names, tuple(tuple(row["shape"]) for row in rows), os.fspath(path))


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("name"), str) or not isinstance(row.get("shape"), list):
        return False
    return all(type(size) is int and size >= 0 for size in row["shape"])


def order_from_config(folder: Path, groups: Sequence[int]) -> ParamOrder:
    r"""Work out the order from a folder's ``config.json``.

    The model is built without memory, and its parameters are grouped as transformers' ``Trainer`` does (with and
    without weight decay), or in one group.

    Args:
        folder: holds ``config.json``.
        groups: number of parameters of every group in the optimizer's state.

    Returns:
        The order; its shapes are still to be compared with the state.

    Raises:
        CheckpointError: the model cannot be built (see :mod:`pss_param.meta_model`), or would be grouped otherwise.
    """
    trained = trained_parameters(folder, sum(groups))
    parts = [trained]
    if len(groups) == 2:
        parts = [tuple(p for p in trained if p.decays), tuple(p for p in trained if not p.decays)]
    if [len(part) for part in parts] != list(groups):
        raise CheckpointError(
            f"{folder}: the optimizer has groups of {list(groups)} parameters, the model of config.json would have "
            f"{[len(part) for part in parts]}; pass --param-order (made by pss_param.write_param_order)"
        )
    ordered = [parameter for part in parts for parameter in part]
    names, shapes = tuple(p.name for p in ordered), tuple(p.shape for p in ordered)
    return ParamOrder(names, shapes, f"{folder / 'config.json'}")
