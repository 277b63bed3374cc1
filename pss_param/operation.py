# SPDX-License-Identifier: Apache-2.0
r"""One pass over all weights of a source: check, restore, compare, smooth; one tensor in memory at a time."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from pss_param.by_design import notes_of, why_left
from pss_param.drift import measure_drift
from pss_param.errors import ArgumentError, CheckpointError, NonFiniteError
from pss_param.finite import count_nonfinite, refuse_nonfinite
from pss_param.optimizer_edit import OptimizerEditor
from pss_param.options import Progress, ProgressHook, RepairOptions, Stage
from pss_param.plan import Plan, TensorSource
from pss_param.reference import HealthySource
from pss_param.report import OptimizerReport, Restored, TensorDrift, TensorReport
from pss_param.surgery import Surgeon, digest, relative_change

Put = Callable[[str, Tensor], None]

MASTER_DISTANCE = 0.02
"""How far a master copy may be from its weight, relative: twice the rounding of bfloat16 and room for a step."""


@dataclass(frozen=True)
class Job:
    r"""One run over a source.

    Args:
        source: where tensors come from.
        plan: which are smoothed.
        options: how.
        where: name of the source, for messages.
        progress: told of every tensor.
        optimizers: knows the master copies of weights, where the source has an optimizer's state.
        counts: NaN and infinite elements by name, of the tensors that somebody has counted already.
    """

    source: TensorSource
    plan: Plan
    options: RepairOptions
    where: str
    progress: ProgressHook | None = None
    optimizers: OptimizerEditor | None = None
    counts: Mapping[str, int] = field(default_factory=dict)

    def tell(self, stage: Stage, name: str, done: int, total: int) -> None:
        r"""Pass a step on.

        Args:
            stage: see :class:`Progress`.
            name: see :class:`Progress`.
            done: see :class:`Progress`.
            total: see :class:`Progress`.
        """
        if self.progress is not None:
            self.progress(Progress(stage, name, done, total))

    def counter(self, stage: Stage, total: int) -> Callable[[int], None]:
        r"""Make a hook that adds up bytes.

        Args:
            stage: what the bytes belong to.
            total: how many there will be.

        Returns:
            To be called with the bytes of every step.
        """
        done = 0

        def advance(step: int) -> None:
            nonlocal done
            done += step
            self.tell(stage, "", done, total)

        return advance

    def aliases(self, name: str) -> list[str]:
        r"""All names of a tensor.

        Args:
            name: one of them.

        Returns:
            The names that share its bytes, this one included.
        """
        return self._by_storage[self.source.tensors[name].storage]

    def names(self, name: str) -> list[str]:
        r"""All names of a parameter, those too that are stored one by one.

        Args:
            name: one of them.

        Returns:
            :meth:`aliases`, and what the plan calls twins.
        """
        return list(dict.fromkeys([*self.aliases(name), *self.plan.twins.get(name, ())]))

    @cached_property
    def _by_storage(self) -> dict[Hashable, list[str]]:
        found: dict[Hashable, list[str]] = {}
        for name, stored in self.source.tensors.items():
            found.setdefault(stored.storage, []).append(name)
        return found


@dataclass(frozen=True)
class Outcome:
    r"""What a pass did.

    Args:
        tensors: one report per smoothed target, in the source's order.
        skipped: reasons by name of the others, in the source's order.
        restored: tensors taken from the reference.
        drift: of every target, where there is a reference.
        masters: keys of the master copies that were repaired.
        optimizer: what was done to the optimizer's state.
        vectors: digests of the norms and biases that are back at their initial values.
        notes: what the user should know besides, one sentence each.
    """

    tensors: tuple[TensorReport, ...]
    skipped: Mapping[str, str]
    restored: Mapping[str, Restored]
    drift: tuple[TensorDrift, ...]
    masters: tuple[str, ...] = ()
    optimizer: OptimizerReport = field(default_factory=OptimizerReport)
    vectors: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def operate(job: Job, put: Put) -> Outcome:
    r"""Go through a source.

    Args:
        job: what to do.
        put: takes every changed tensor.

    Returns:
        What was done. A :class:`NonFiniteError` says which tensors hold NaN or infinity, or would after the cast
        to their stored type.

    Raises:
        ArgumentError: there is no target.
    """
    if not job.plan.targets:
        raise ArgumentError(
            f"no tensor of {job.where} is a target under targets={job.options.targets!r}; "
            "see the reasons with `pss-repair scan --skipped`, then use --targets all or --include"
        )
    with HealthySource(job.options.reference, job.source.tensors) as reference:
        return _Pass(job, put, reference).run()


class _Pass:
    def __init__(self, job: Job, put: Put, reference: HealthySource) -> None:
        self.job, self.put, self.reference = job, put, reference
        self.surgeon = Surgeon(job.options, job.plan.special)
        self.reports: list[TensorReport] = []
        self.skipped = dict(job.plan.skipped)
        self.restored: dict[str, Restored] = {}
        self.drift: list[TensorDrift] = []
        self.vectors: dict[str, str] = {}
        self.masters: list[str] = []
        self.bad: dict[str, int] = {}
        self.left: dict[str, str] = {}
        self.done_storages: set[object] = set()

    def run(self) -> Outcome:
        job = self.job
        floats = {name: stored for name, stored in job.source.tensors.items() if stored.floating}
        total, done = sum(stored.nbytes for stored in floats.values()), 0
        for name, stored in floats.items():
            job.tell("repair", name, done, total)
            if stored.storage not in self.done_storages:
                self._visit(name)
                self.done_storages.add(stored.storage)
            done += stored.nbytes
        job.tell("repair", "", total, total)
        refuse_nonfinite(self.bad, job.where)
        skipped = {name: self.skipped[name] for name in job.source.tensors if name in self.skipped}
        return Outcome(
            tuple(self.reports),
            skipped,
            self.restored,
            tuple(self.drift),
            tuple(self.masters),
            vectors=self.vectors,
            notes=tuple(notes_of(self.left)),
        )

    def _visit(self, name: str) -> None:
        aliases = self.job.aliases(name)
        target = next((n for n in aliases if n in self.job.plan.targets), None)
        vector = next((n for n in aliases if n in self.job.plan.vectors), None)
        count = self.job.counts.get(name)
        if count is None:
            count = count_nonfinite(self.job.source.blocks(name))
        if count and target is None and vector is None and self._leave(aliases, count):
            return
        if count:
            if self.job.options.nonfinite == "reference":
                self._restore(name, count)
            else:
                self.bad[name] = count
        elif target is not None and not self.bad:
            self._smooth(target)
        elif vector is not None and not self.bad:
            self._start_again(vector, self.job.plan.vectors[vector])

    def _leave(self, names: list[str], count: int) -> bool:
        why = why_left(self.job.source, names, self.job.options.exclude, count)
        if why:
            self.left[names[0]] = why
            self.skipped.update(dict.fromkeys(names, why))
        return bool(why)

    def _start_again(self, name: str, value: float) -> None:
        old = self.job.source.read(name)
        if bool((old.double() == value).all()):
            self.skipped[name] = "is at its initial value"
            return
        fresh = torch.full_like(old, value)
        self.put(name, fresh)
        for key in self._master_keys(name):
            self._put_master(key, fresh)
        self.vectors[name] = digest(fresh)

    def _restore(self, name: str, count: int) -> None:
        stored = self.job.source.tensors[name]
        value = self.reference.get(self._in_reference(name), stored.shape).to(stored.dtype).contiguous()
        if lost := count_nonfinite([value]):
            raise NonFiniteError(
                f"{name} of the reference does not fit into {stored.dtype_name}: {lost} value(s) overflow; "
                "name a reference of the same type"
            )
        self.put(name, value)
        for key in self._master_keys(name):
            self._put_master(key, value)
        self.restored[name] = Restored(count, digest(value))
        for alias in self.job.aliases(name):
            self.skipped[alias] = f"held {count} non-finite value(s) and was taken from the reference"

    def _smooth(self, name: str) -> None:
        job, target = self.job, self.job.plan.targets[name]
        weight, healthy = job.source.read(name), None
        if self.reference.present:
            healthy = self.reference.get(self._in_reference(name), tuple(weight.shape)).to(weight.device)
            drift = measure_drift(target, weight, healthy)
            self.drift.append(drift)
            if job.options.where == "drifted" and drift.worst.ratio >= job.options.drifted_below:
                self.skipped[name] = (
                    f"its stable rank is {drift.worst.ratio:.2f} x the reference's, "
                    f"not below {job.options.drifted_below:g}"
                )
                return
        keys = self._master_keys(name)
        masters = [self._read_master(key, weight) for key in keys]
        try:
            value, copies, report = self.surgeon.smooth(target, weight, healthy, masters)
        except NonFiniteError as error:
            raise NonFiniteError(f"{self.job.where}: {name}: {error}") from None
        self.reports.append(report)
        if report.changed:
            self.put(name, value)
            for key, copy in zip(keys, copies, strict=True):
                self._put_master(key, copy)

    def _in_reference(self, name: str) -> str:
        return next((known for known in self.job.names(name) if self.reference.has(known)), name)

    def _master_keys(self, name: str) -> tuple[str, ...]:
        optimizers = self.job.optimizers
        return () if optimizers is None else optimizers.masters_of(self.job.names(name))

    def _read_master(self, key: str, weight: Tensor) -> Tensor:
        master = self.job.source.read(key)
        if master.shape != weight.shape or relative_change(weight, master) > MASTER_DISTANCE:
            raise CheckpointError(
                f"{self.job.where}: {key} looks like the optimizer's own copy of a weight, but is not equal to it; the "
                "next step would overwrite the repair, so start a new optimizer from the repaired weights' file alone"
            )
        return master

    def _put_master(self, key: str, value: Tensor) -> None:
        if self.job.optimizers is not None:
            self.put(key, value.to(self.job.optimizers.layout.dtype(key)))
        if key not in self.masters:
            self.masters.append(key)
