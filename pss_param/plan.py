# SPDX-License-Identifier: Apache-2.0
r"""From named tensors to the list of those that are smoothed, by names, shapes and types."""

import glob
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from pss_param.checkpoint import StoredTensor
from pss_param.errors import ArgumentError
from pss_param.room import roomy
from pss_param.selection import matches
from pss_param.targets import EXCLUDED, ONE_CHANNEL, Selection, Skipped, Target, TargetRules, TensorInfo, select_tensors
from pss_param.ties import outputs_of, tied_tables
from pss_param.vectors import initial_value


class TensorSource(Protocol):
    r"""Named tensors that can be read one at a time; every checkpoint layout is one."""

    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any] | None

    def read(self, name: str) -> Tensor:
        r"""Read one tensor.

        Args:
            name: its key.

        Returns:
            The tensor, on any device.
        """

    def blocks(self, name: str) -> Iterator[Tensor]:
        r"""Go through one tensor's elements in pieces.

        Args:
            name: its key.

        Returns:
            Pieces of any shape.
        """


class StateDictSource:
    r"""A state dict in memory as a source; entries that are no tensors are not seen.

    Args:
        state_dict: tensors by name.

    Raises:
        ArgumentError: it is no dictionary, or a tensor in it has no values.
    """

    def __init__(self, state_dict: Mapping[str, Any]) -> None:
        r"""See the class."""
        if not isinstance(state_dict, Mapping):
            raise ArgumentError(
                f"a state dict must be a dictionary of tensors by name, got {type(state_dict).__name__}; "
                "pass model.state_dict()"
            )
        if odd := [name for name in state_dict if not isinstance(name, str)]:
            raise ArgumentError(f"names in a state dict must be texts, got {odd[0]!r}; pass model.state_dict()")
        self._values = {name: value for name, value in state_dict.items() if isinstance(value, Tensor)}
        self.tensors: Mapping[str, StoredTensor] = {n: _described(n, value) for n, value in self._values.items()}
        self.config: Mapping[str, Any] | None = None

    def read(self, name: str) -> Tensor:
        r"""Give one tensor.

        Args:
            name: its key.

        Returns:
            The tensor itself, without its history.
        """
        return self._values[name].detach()

    def blocks(self, name: str) -> Iterator[Tensor]:
        r"""Give one tensor as a single piece.

        Args:
            name: its key.

        Yields:
            Tensor: the tensor itself.
        """
        yield self.read(name)


def _described(name: str, value: Tensor) -> StoredTensor:
    if value.is_meta or is_lazy(value):
        why = "is lazy" if is_lazy(value) else "is on the device meta"
        raise ArgumentError(f"{name} {why} and has no values; load the weights before the repair")
    if value.is_nested or value.layout != torch.strided:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        return StoredTensor(name, None, kind, (), (), name)
    where = (value.data_ptr(), value.stride(), tuple(value.shape), value.dtype) if value.numel() else name
    kind = str(value.dtype).removeprefix("torch.")
    return StoredTensor(name, value.dtype, kind, tuple(value.shape), (), where)


@dataclass(frozen=True)
class Plan:
    r"""Which tensors will be smoothed.

    Args:
        targets: by name, in the checkpoint's order; of tied names only the first.
        skipped: reasons by name, in the checkpoint's order.
        special: targets that a deep repair treats otherwise than the rest, with what they are: a ``"kernel"`` that may
            be depthwise, so that its filters have nothing but a norm in common; ``"roomy"``, so that it may outgrow a
            fresh one in health (:mod:`pss_param.room`); a ``"table"`` of tokens; an ``"end"``, which is a head, a table
            that is one too, or a stem; a table, such as of places, that is ``"added"`` to one that is a head.
        vectors: values of a fresh model by name, of the norms and biases that a deep repair puts back.
        twins: names of equal values that are stored one by one and mean one parameter, each with the others.
    """

    targets: Mapping[str, Target]
    skipped: Mapping[str, str]
    special: Mapping[str, str] = field(default_factory=dict)
    vectors: Mapping[str, float] = field(default_factory=dict)
    twins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def make_plan(source: TensorSource, rules: TargetRules, deep: bool = False) -> Plan:
    r"""Choose targets by name, shape and type; only a head that may be a tied embedding is read.

    Args:
        source: the tensors.
        rules: which of them to take.
        deep: whether matrices outside the blocks, norms and biases are treated too.

    Returns:
        The plan; together its targets, vectors and skipped name every tensor once.

    Raises:
        ArgumentError: the rules name nothing, or a tensor that cannot be taken.

    Example:
        >>> import torch
        >>> weights = {"layers.0.mlp.up_proj.weight": torch.ones(8, 4), "norm.weight": torch.ones(4)}
        >>> list(make_plan(StateDictSource(weights), TargetRules()).targets)
        ['layers.0.mlp.up_proj.weight']
    """
    infos = {n: TensorInfo(t.shape, t.dtype) for n, t in source.tensors.items() if t.dtype is not None}
    try:
        selection: Selection = select_tensors(infos, rules, source.config)
        outside, twins = _outside(infos, rules, source) if deep else ({}, {})
    except ArgumentError as error:
        raise ArgumentError(f"{getattr(source, 'path', 'the state dict')}: {error}") from None
    inside = {target.name: target for target in selection.targets}
    targets = {name: target for some in (*outside.values(), inside) for name, target in some.items()}
    special = {
        **{name: what for what, some in outside.items() for name in some if what != "end" or name not in inside},
        **dict.fromkeys(roomy(targets.values(), infos), "roomy"),
        **dict.fromkeys((name for name in outside.get("end", ()) if _one_channel(infos[name].shape)), "kernel"),
    }
    skipped = {skip.name: skip.reason for skip in (*selection.skipped, *_unreadable(source))}
    vectors = _vectors(source, rules, skipped) if deep else {}
    _spare_shared(source, targets, vectors, skipped)
    _settle_shared(source, targets, vectors, skipped)
    order = list(source.tensors)
    return Plan(
        {name: targets[name] for name in order if name in targets},
        {name: skipped[name] for name in order if name in skipped and name not in targets and name not in vectors},
        {name: what for name, what in special.items() if name in targets},
        vectors,
        twins,
    )


def _spare_shared(
    source: TensorSource, targets: dict[str, Target], vectors: dict[str, float], skipped: dict[str, str]
) -> None:
    """What shares its bytes with an excluded tensor stays as that does."""
    excluded = {source.tensors[name].storage: name for name, why in skipped.items() if why.startswith(EXCLUDED)}
    for name, stored in source.tensors.items():
        if excluded.get(stored.storage, name) != name:
            skipped[name] = f"shares its bytes with {excluded[stored.storage]}, which is excluded"
            targets.pop(name, None)
            vectors.pop(name, None)


def _settle_shared(
    source: TensorSource, targets: dict[str, Target], vectors: dict[str, float], skipped: dict[str, str]
) -> None:
    owner: dict[Any, str] = {}
    for name, stored in source.tensors.items():
        if name in targets or name in vectors:
            owner.setdefault(stored.storage, name)
    for name, stored in source.tensors.items():
        if (first := owner.get(stored.storage, name)) != name:
            skipped[name] = f"shares its bytes with {first}, which is repaired"
            targets.pop(name, None)
            vectors.pop(name, None)


def _outside(
    infos: Mapping[str, TensorInfo], rules: TargetRules, source: TensorSource
) -> tuple[dict[str, dict[str, Target]], dict[str, tuple[str, ...]]]:
    """Targets outside the blocks by what they are, the ordinary ones as ends, and twins: see :class:`Plan`."""
    wider = _with_kernels(infos, replace(rules, preset="all"), source)
    allowed = {target.name for target in select_tensors(infos, wider, source.config).targets}
    # What is tied is tied whether a user excludes one of its names or not.
    found = select_tensors(infos, replace(wider, exclude=()), source.config).targets
    maps = {target.name: target for target in found if _is_a_map(target, infos)}
    others = {target.name: target for target in found if target.name not in maps}
    groups = {table: {table, *heads} for table, heads in tied_tables(source, others, maps).items()}
    tied = {table: group for table, group in groups.items() if group <= allowed}
    allowed -= set().union(*(group for table, group in groups.items() if table not in tied))
    parts = _parted(maps, others, tied, allowed, source)
    twins = {name: tuple(sorted(group - {name})) for group in tied.values() for name in group if len(group) > 1}
    return {what: {name: t for name, t in some.items() if name in allowed} for what, some in parts.items()}, twins


def _with_kernels(infos: Mapping[str, TensorInfo], rules: TargetRules, source: TensorSource) -> TargetRules:
    # Whether such a kernel is depthwise makes no difference to its norm, and only that is treated.
    found = select_tensors(infos, rules, source.config)
    kernels = [skip.name for skip in found.skipped if skip.reason == ONE_CHANNEL and skip.name.endswith("weight")]
    return replace(rules, include=(*rules.include, *map(glob.escape, kernels))) if kernels else rules


def _parted(
    maps: Mapping[str, Target],
    others: Mapping[str, Target],
    tied: Mapping[str, set[str]],
    allowed: set[str],
    source: TensorSource,
) -> dict[str, dict[str, Target]]:
    heads, stored = set().union(*tied.values()), source.tensors
    tables = {name: t for name, t in others.items() if t.role == "embedding" and name not in heads}
    # As many rows as a head has outputs: tokens, and not places, whose table is smooth and of low rank in health.
    outputs = outputs_of(source, {name: t for name, t in maps.items() if name in allowed - heads})
    tokens = {name: t for name, t in tables.items() if stored[name].shape[0] in outputs}
    ends = {**maps, **{name: others[name] for name in heads if name in others}}
    added = {name: t for name, t in tables.items() if name not in tokens and _is_added(name, tied, source)}
    return {"end": ends, "table": tokens, "added": added}


def _is_added(name: str, tied: Iterable[str], source: TensorSource) -> bool:
    """Whether a table is as wide as one that is a head, has no bias, and stands beside or below it."""
    if f"{name.removesuffix('weight')}bias" in source.tensors:
        return False
    wide, stored = source.tensors[name].shape[1:], source.tensors
    return any(stored[table].shape[1:] == wide and name.startswith(_module_of(table)) for table in tied)


def _module_of(name: str) -> str:
    """What holds the module of a weight, with a dot at the end: ``"transformer."`` of ``transformer.wte.weight``."""
    return "".join(f"{word}." for word in name.split(".")[:-2])


def _one_channel(shape: tuple[int, ...]) -> bool:
    return len(shape) > 2 and shape[1] == 1


def _is_a_map(target: Target, infos: Mapping[str, TensorInfo]) -> bool:
    # A table may have any name, and its fresh scale is another one than a linear layer's; but it never has a bias.
    if target.role == "other" and target.block is None and len(infos[target.name].shape) == 2:
        return f"{target.name.removesuffix('weight')}bias" in infos
    return target.role != "embedding"


def _vectors(source: TensorSource, rules: TargetRules, skipped: dict[str, str]) -> dict[str, float]:
    found, shapes = {}, {name: stored.shape for name, stored in source.tensors.items()}
    for name, stored in source.tensors.items():
        value = initial_value(name, stored.shape, source.config, shapes) if stored.floating else None
        pattern = next((pattern for pattern in rules.exclude if matches(name, pattern)), None)
        if value is not None and pattern is not None:
            skipped[name] = f"{EXCLUDED} {pattern!r}"
        elif value is not None:
            found[name] = value
    return found


def _unreadable(source: TensorSource) -> Iterator[Skipped]:
    for name, stored in source.tensors.items():
        if stored.dtype is None:
            yield Skipped(name, f"stored as {stored.dtype_name}, which cannot be computed with in place")
