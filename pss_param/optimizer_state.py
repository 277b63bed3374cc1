# SPDX-License-Identifier: Apache-2.0
r"""Optimizer states inside a checkpoint: which tensor is which moment of which parameter.

Every framework keeps them under keys that end in ``"state", parameter, field``; the parameter is a number, or
its name. See Note [Initial states].
"""

# Note [Initial states]
# `reset` writes what a fresh optimizer would hold, in place; nothing is ever removed from a file, because trainers
# that find no optimizer skip the scheduler as well, in silence. Fields that are not listed here (statistics of
# second-order methods, 8-bit codes with their tables) have initial states that depend on more than their shape:
# then a reset is refused.

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pss_param.checkpoint import Layout
from pss_param.checkpoint.dcp import DcpLayout
from pss_param.checkpoint.torch_content import pairs_of, texts_of
from pss_param.errors import CheckpointError
from pss_param.param_order import ParamOrder
from pss_param.roles import plain_name

Owner = int | str

INITIAL: Mapping[str, float] = {
    **dict.fromkeys(
        (
            "step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "acc_delta",
            "grad_avg", "exp_avg_sq_row", "exp_avg_sq_col",
        ),
        0.0,
    ),
    "mu_product": 1.0,
}  # fmt: skip
"""Initial value by name of the field: Adam(W), NAdam, RAdam, Adamax, SGD, RMSprop, Adadelta, Adafactor, Lion."""

MAX_STATES = 1000
"""Optimizers of one checkpoint."""

_MASTER = re.compile(r"master|fp32|single_partition", re.IGNORECASE)


@dataclass(frozen=True)
class OptimizerState:
    r"""One optimizer's state.

    Args:
        prefix: keys that lead to it; in a folder the name of the file comes first.
        fields: key in ``layout.state`` by field by parameter.
        groups: numbers of the parameters by group; empty where parameters have names.
        names: names of the parameters in the order of the groups where the file itself records them.
        numbers: fields that are plain numbers in a pickle, not tensors, by parameter.
        loose: tensors of the optimizer that belong to no single parameter.
    """

    prefix: tuple[Owner, ...]
    fields: Mapping[Owner, Mapping[str, str]]
    groups: tuple[tuple[int, ...], ...] = ()
    names: tuple[str, ...] = ()
    numbers: Mapping[Owner, tuple[str, ...]] = field(default_factory=dict)
    loose: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        r"""What to call it in messages."""
        return ".".join(map(str, self.prefix)) or "the optimizer state"

    @property
    def numbered(self) -> bool:
        r"""Whether parameters have numbers instead of names."""
        return any(isinstance(owner, int) for owner in self.fields)

    def tensors(self) -> Iterator[str]:
        r"""All tensors of the parameters.

        Yields:
            str: their keys in ``layout.state``.
        """
        for fields in self.fields.values():
            yield from fields.values()

    def masters(self) -> dict[Owner, tuple[str, ...]]:
        r"""Copies of weights in higher precision, which the next step would write over the weights.

        Returns:
            Keys of such tensors by parameter.
        """
        found = {o: tuple(k for name, k in f.items() if _MASTER.search(name)) for o, f in self.fields.items()}
        return {owner: keys for owner, keys in found.items() if keys}

    def loose_masters(self) -> tuple[str, ...]:
        r"""Such copies that belong to no single parameter.

        Returns:
            Their keys.
        """
        return tuple(key for key in self.loose if _MASTER.search(key.split(":", 1)[-1]))


def find_optimizers(layout: Layout) -> tuple[OptimizerState, ...]:
    r"""Find all optimizer states of an open checkpoint.

    Args:
        layout: the checkpoint, entered.

    Returns:
        The states, in the order of the checkpoint.

    Raises:
        CheckpointError: a state contradicts itself, or there are more than any training run has.
    """
    if isinstance(layout, DcpLayout):
        used = {key for fields in layout.moments.values() for key in fields.values()}
        rest = tuple(key for key in layout.state if key not in used)
        by_name: dict[Owner, Mapping[str, str]] = dict(layout.moments.items())
        return (OptimizerState(("the optimizer",), by_name, loose=rest),) if layout.state else ()
    found: dict[tuple[Owner, ...], dict[Owner, dict[str, str]]] = {}
    loose: dict[str, tuple[Owner, ...]] = {}
    for key in layout.state:
        path = layout.paths[key]
        at = next((i for i, word in enumerate(path[:-2]) if word == "state"), None)
        if at is None:
            loose[key] = path
        else:
            name = ".".join(map(str, path[at + 2 :]))
            found.setdefault(path[:at], {}).setdefault(path[at + 1], {})[name] = key
    if len(found) > MAX_STATES:
        raise CheckpointError(f"{layout.path} holds {len(found)} states of optimizers, at most {MAX_STATES} are read")
    under = _under(loose, found)
    try:
        states = [_read_state(layout, prefix, fields, under.get(prefix, ())) for prefix, fields in found.items()]
    except ValueError as error:
        raise CheckpointError(f"{layout.path} does not have a usable optimizer state: {error}") from None
    return tuple(state for state in states if state is not None)


def _under(loose: Mapping[str, tuple[Owner, ...]], prefixes: Collection[tuple[Owner, ...]]) -> dict[Any, list[str]]:
    under: dict[Any, list[str]] = {}
    for key, path in loose.items():
        for length in range(1, len(path) + 1):
            if path[:length] in prefixes:
                under.setdefault(path[:length], []).append(key)
    return under


def _read_state(
    layout: Layout, prefix: tuple[Owner, ...], fields: Mapping[Owner, Mapping[str, str]], rest: Sequence[str]
) -> OptimizerState | None:
    node = content_at(layout, prefix)
    if node is not None and "param_groups" not in texts_of(node):
        return None  # the state of something else, such as a callback
    groups, names = _groups(node)
    return OptimizerState(prefix, fields, groups, names, _numbers(node), tuple(rest))


def content_at(layout: Layout, path: Sequence[Owner]) -> Any:
    r"""The pickled object at the end of a path.

    Args:
        layout: the checkpoint.
        path: keys and positions; in a folder the name of the file comes first.

    Returns:
        The object as :func:`~pss_param.checkpoint.pickled.read_pickle` gives it, or None where nothing is known.
    """
    node: Any = layout.content
    for word in path:
        if isinstance(node, Mapping):
            node = node.get(word)
        elif isinstance(node, list | tuple) and isinstance(word, int):
            node = node[word]
        else:
            node = next((value for key, value in pairs_of(node) or () if key == word and type(key) is type(word)), None)
        if node is None:
            return None
    return node


def _groups(node: Any) -> tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]:
    rows = texts_of(node).get("param_groups") if node is not None else None
    tables = [texts_of(row) for row in rows] if isinstance(rows, list) else []
    groups: list[tuple[int, ...]] = []
    names: list[str] = []
    for table in tables:
        members = table.get("params")
        if not isinstance(members, list) or not all(type(number) is int for number in members):
            return (), ()
        groups.append(tuple(members))
        recorded = table.get("param_names")
        names += [name for name in recorded if isinstance(name, str)] if isinstance(recorded, list) else []
    complete = len(names) == sum(map(len, groups))
    return tuple(groups), tuple(names) if complete else ()


def _numbers(node: Any) -> dict[Owner, tuple[str, ...]]:
    found: dict[Owner, tuple[str, ...]] = {}
    for owner, entry in pairs_of(texts_of(node).get("state")) or () if node is not None else ():
        plain = tuple(name for name, value in texts_of(entry).items() if isinstance(value, int | float))
        if plain and isinstance(owner, int | str):
            found[owner] = plain
    return found


def owners_by_name(state: OptimizerState, layout: Layout, order: ParamOrder | None) -> dict[str, Owner]:
    r"""Map names of parameters, as the bare model has them, to the keys of an optimizer's state.

    Args:
        state: the optimizer's.
        layout: for the shapes of its moments.
        order: names by number; None where the state has names.

    Returns:
        Key of the state by plain name.

    Raises:
        CheckpointError: count or shapes do not fit.
    """
    if order is None:
        return {plain_name(str(owner)): owner for owner in state.fields}
    numbers = [number for group in state.groups for number in group]
    if len(numbers) != len(order.names):
        raise CheckpointError(
            f"{layout.path}: {state.label} has {len(numbers)} parameters, {order.origin} has {len(order.names)}; "
            "it belongs to another model or optimizer"
        )
    for number, name, shape in zip(numbers, order.names, order.shapes, strict=True):
        for moment, key in state.fields.get(number, {}).items():
            seen = layout.state[key].shape
            if order.checked and moment in {"exp_avg", "exp_avg_sq", "momentum_buffer"} and seen != shape:
                raise CheckpointError(
                    f"{layout.path}: {state.label}: parameter {number} should be {name} {shape} after {order.origin}, "
                    f"but its {moment} has the shape {seen}; pass --param-order (made by pss_param.write_param_order)"
                )
    return {plain_name(name): number for number, name in zip(numbers, order.names, strict=True)}
