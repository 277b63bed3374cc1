# SPDX-License-Identifier: Apache-2.0
r"""Two checkpoints of one model beside each other: which matrices fell, and what else differs."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pss_param.checkpoint import Layout, open_checkpoint
from pss_param.counterparts import pair_names
from pss_param.drift import measure_drift
from pss_param.errors import ArgumentError
from pss_param.finite import count_nonfinite
from pss_param.options import Progress, ProgressHook, RepairOptions, pick_device
from pss_param.plan import Plan, make_plan
from pss_param.report import TensorDrift
from pss_param.surgery import relative_change
from pss_param.version import __version__

SCHEMA = "pss-param/compare-report/1"


@dataclass(frozen=True)
class CompareReport:
    r"""What differs between two checkpoints.

    Args:
        sources: paths of the first (the reference) and of the second.
        formats: their formats.
        rows: one per target of the second that both have, in the second's order.
        others: relative distance of the other floating tensors that differ, by name.
        identical: how many floating tensors are equal in all bits.
        missing: names that only the first has, and that only the second has.
        unlike: what keeps two tensors of one name from being compared, by name.
        nonfinite: number of NaN and infinite values in both, by name.
    """

    sources: tuple[str, str]
    formats: tuple[str, str]
    rows: tuple[TensorDrift, ...]
    others: Mapping[str, float]
    identical: int
    missing: tuple[tuple[str, ...], tuple[str, ...]]
    unlike: Mapping[str, str]
    nonfinite: Mapping[str, tuple[int, int]]
    version: str = __version__
    schema: str = SCHEMA

    def to_json(self) -> str:
        r"""The report for machines.

        Returns:
            Indented JSON that ends in a line break.
        """
        content: dict[str, Any] = asdict(self)
        ordered = {"schema": content.pop("schema"), "version": content.pop("version"), **content}
        return json.dumps(ordered, indent=1) + "\n"


def compare_checkpoints(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    options: RepairOptions | None = None,
    *,
    progress: ProgressHook | None = None,
) -> CompareReport:
    r"""Compare two checkpoints tensor by tensor; names may differ by what trainers put in front of them.

    Args:
        first: the reference, any format.
        second: another checkpoint of the same model, any format.
        options: ``targets``, ``include``, ``exclude``, ``per_head`` and ``device`` count here; None for the
            defaults.
        progress: told of every tensor.

    Returns:
        The report. A checkpoint that cannot be read raises :class:`CheckpointError`, two without a common tensor
        :class:`ArgumentError`.

    Example:
        >>> import tempfile, torch, safetensors.torch
        >>> folder = tempfile.mkdtemp()
        >>> paths = [f"{folder}/{name}.safetensors" for name in "ab"]
        >>> for scale, path in enumerate(paths, 1):
        ...     safetensors.torch.save_file({"layers.0.mlp.up_proj.weight": scale * torch.eye(8)}, path)
        >>> compare_checkpoints(*paths).rows[0].distance
        1.0
    """
    options = options or RepairOptions()
    with open_checkpoint(first) as good, open_checkpoint(second) as other:
        return _Comparison(good, other, make_plan(other, options.rules()), options).run(progress)


class _Comparison:
    def __init__(self, good: Layout, other: Layout, plan: Plan, options: RepairOptions) -> None:
        self.good, self.other, self.plan = good, other, plan
        self.device = pick_device(options.device)
        self.rows: list[TensorDrift] = []
        self.others: dict[str, float] = {}
        self.unlike: dict[str, str] = {}
        self.nonfinite: dict[str, tuple[int, int]] = {}
        self.identical = 0

    def run(self, progress: ProgressHook | None) -> CompareReport:
        pairs = self._pairs()
        total, done = sum(self.other.tensors[name].nbytes for name in pairs), 0
        for name, counterpart in pairs.items():
            if progress is not None:
                progress(Progress("scan", name, done, total))
            self._compare(name, counterpart)
            done += self.other.tensors[name].nbytes
        here = set(pairs.values())
        return CompareReport(
            sources=(str(self.good.path), str(self.other.path)),
            formats=(self.good.format, self.other.format),
            rows=tuple(self.rows),
            others=self.others,
            identical=self.identical,
            missing=(
                tuple(name for name in self.good.tensors if name not in here),
                tuple(name for name in self.other.tensors if name not in pairs),
            ),
            unlike=self.unlike,
            nonfinite=self.nonfinite,
        )

    def _pairs(self) -> dict[str, str]:
        try:
            return pair_names(self.other.tensors, self.good.tensors)
        except ArgumentError as error:
            raise ArgumentError(f"{self.other.path} and {self.good.path} {error}") from None

    def _compare(self, name: str, counterpart: str) -> None:
        there, here = self.good.tensors[counterpart], self.other.tensors[name]
        if there.shape != here.shape:
            self.unlike[name] = f"shape {there.shape} and {here.shape}"
        elif not (there.floating and here.floating):
            if there.dtype_name != here.dtype_name:
                self.unlike[name] = f"type {there.dtype_name} and {here.dtype_name}"
        else:
            self._measure(name, counterpart)

    def _measure(self, name: str, counterpart: str) -> None:
        counts = count_nonfinite(self.good.blocks(counterpart)), count_nonfinite(self.other.blocks(name))
        old, new = self._read(self.good, counterpart), self._read(self.other, name)
        if any(counts):
            # Masks hold infinities by design; a NaN is never equal.
            if counts[0] == counts[1] and torch.equal(old, new.to(old.dtype)):
                self.identical += 1
            else:
                self.nonfinite[name] = counts
            return
        distance = relative_change(old, new)
        self.identical += distance == 0
        if name in self.plan.targets:
            self.rows.append(measure_drift(self.plan.targets[name], new, old))
        elif distance:
            self.others[name] = distance

    def _read(self, layout: Layout, name: str) -> Tensor:
        return layout.read(name).to(self.device)
