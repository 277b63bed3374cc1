# SPDX-License-Identifier: Apache-2.0
r"""From named tensors to the list of those that are smoothed, by names, shapes and types alone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from pss_param.checkpoint import StoredTensor
from pss_param.errors import ArgumentError
from pss_param.targets import Selection, Skipped, Target, TargetRules, TensorInfo, select_tensors


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
    """

    def __init__(self, state_dict: Mapping[str, Any]) -> None:
        r"""See the class."""
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
    where = (value.data_ptr(), value.stride(), tuple(value.shape), value.dtype) if value.numel() else name
    kind = str(value.dtype).removeprefix("torch.")
    return StoredTensor(name, value.dtype, kind, tuple(value.shape), (), where)


@dataclass(frozen=True)
class Plan:
    r"""Which tensors will be smoothed.

    Args:
        targets: by name, in the checkpoint's order; of tied names only the first.
        skipped: reasons by name, in the checkpoint's order.
    """

    targets: Mapping[str, Target]
    skipped: Mapping[str, str]


def make_plan(source: TensorSource, rules: TargetRules) -> Plan:
    r"""Choose targets by name, shape and type; nothing is read.

    Args:
        source: the tensors.
        rules: which of them to take.

    Returns:
        The plan; together its two parts name every tensor once.

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
    except ArgumentError as error:
        raise ArgumentError(f"{getattr(source, 'path', 'the state dict')}: {error}") from None
    targets = {target.name: target for target in selection.targets}
    skipped = {skip.name: skip.reason for skip in (*selection.skipped, *_unreadable(source))}
    owner: dict[Any, str] = {}
    for name, stored in source.tensors.items():
        if name in targets and (first := owner.setdefault(stored.storage, name)) != name:
            skipped[name] = f"shares its bytes with {first}, which is repaired"
            del targets[name]
    order = list(source.tensors)
    return Plan(
        {name: targets[name] for name in order if name in targets},
        {name: skipped[name] for name in order if name in skipped},
    )


def _unreadable(source: TensorSource) -> Iterator[Skipped]:
    for name, stored in source.tensors.items():
        if stored.dtype is None:
            yield Skipped(name, f"stored as {stored.dtype_name}, which cannot be computed with in place")
