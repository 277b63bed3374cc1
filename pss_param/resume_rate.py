# SPDX-License-Identifier: Apache-2.0
r"""The learning rate at which the optimizer of a checkpoint goes on, where the checkpoint says it."""

from collections.abc import Iterator, Mapping
from typing import Any

from pss_param.checkpoint.torch_content import pairs_of

LEVELS = 3
"""Levels at which optimizers lie: a folder's file, a trainer's dictionary, a list of several."""

_ABSURD = 1e30  # an integer out of a file may be too large for a float


def note_rate(content: Any) -> Iterator[str]:
    r"""Tell the rate, since the one that killed a run kills it again.

    Args:
        content: pickled objects as :attr:`~pss_param.Layout.content` has them.

    Yields:
        str: one sentence; nothing where no rate is stored as a plain number.
    """
    groups = list(_groups(content))
    rates, initial = (_numbers(groups, key) for key in ("lr", "initial_lr"))
    if rates:
        began = f" (initial_lr {_span(initial)})" if initial and initial != rates else ""
        yield (
            f"the checkpoint's optimizer resumes at a learning rate of {_span(rates)}{began}: the rate that killed the "
            "run kills it again, set a lower one"
        )


def _groups(node: Any, level: int = 0) -> Iterator[Any]:
    if isinstance(rows := _at(node, "param_groups"), list):
        yield from rows
    elif level < LEVELS:
        for member in _values(node):
            yield from _groups(member, level + 1)


def _values(node: Any) -> list[Any]:
    if isinstance(node, Mapping):
        return list(node.values())
    return list(node) if isinstance(node, list | tuple) else [value for _, value in pairs_of(node) or ()]


def _at(node: Any, key: str) -> Any:
    # Keys of a pickle may be anything; nothing but a text is compared.
    return next((value for name, value in pairs_of(node) or () if isinstance(name, str) and name == key), None)


def _numbers(groups: list[Any], key: str) -> set[float]:
    found = [value for group in groups if type(value := _at(group, key)) in {int, float}]
    return {float(value) for value in found if 0 < value < _ABSURD}


def _span(values: set[float]) -> str:
    low, high = min(values), max(values)
    return f"{high:g}" if low == high else f"{low:g} to {high:g}"
