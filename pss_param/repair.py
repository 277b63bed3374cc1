# SPDX-License-Identifier: Apache-2.0
r"""Offline repair: choose the targets, smooth them one at a time, report.

This module knows names and tensors; where their bytes lie is the business of :mod:`pss_param.checkpoint`.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from pss_param.checkpoint import Editor, Layout, StagedFile, open_checkpoint
from pss_param.checkpoint.transfer import write_all
from pss_param.errors import ArgumentError
from pss_param.finite import count_nonfinite, refuse_nonfinite
from pss_param.options import Progress, ProgressHook, RepairOptions
from pss_param.plan import Plan, StateDictSource, TensorSource, make_plan
from pss_param.report import Report, TensorReport, report_path
from pss_param.surgery import Surgeon


@dataclass(frozen=True)
class Job:
    r"""One run over a source.

    Args:
        source: where tensors come from.
        plan: which are smoothed.
        options: how.
        where: name of the source, for messages.
        progress: told of every tensor.
    """

    source: TensorSource
    plan: Plan
    options: RepairOptions
    where: str
    progress: ProgressHook | None

    def tell(self, stage: Literal["copy", "repair"], name: str, done: int, total: int) -> None:
        r"""Pass a step on.

        Args:
            stage: see :class:`Progress`.
            name: see :class:`Progress`.
            done: see :class:`Progress`.
            total: see :class:`Progress`.
        """
        if self.progress is not None:
            self.progress(Progress(stage, name, done, total))


def run(job: Job, put: Callable[[str, Tensor], None] | None) -> tuple[TensorReport, ...]:
    r"""Check every floating tensor and smooth the targets; one tensor is in memory at a time.

    Args:
        job: what to do.
        put: takes every changed tensor; None to compute only.

    Returns:
        One report per target, in the source's order. A :class:`NonFiniteError` says which tensors hold NaN or
        infinity, or would after the cast to their stored type.

    Raises:
        ArgumentError: there is no target.
    """
    if not job.plan.targets:
        raise ArgumentError(
            f"no tensor of {job.where} is a target under targets={job.options.targets!r}; "
            "see the reasons with `pss-repair scan --skipped`, then use --targets all or --include"
        )
    reports: list[TensorReport] = []
    bad: dict[str, int] = {}
    floats = {name: stored for name, stored in job.source.tensors.items() if stored.floating}
    total, done = sum(stored.nbytes for stored in floats.values()), 0
    with Surgeon(job.options) as surgeon:
        for name, stored in floats.items():
            job.tell("repair", name, done, total)
            if count := count_nonfinite(job.source.blocks(name)):
                bad[name] = count
            elif name in job.plan.targets and not bad:
                reports.append(_operate(job, surgeon, name, put))
            done += stored.nbytes
    job.tell("repair", "", total, total)
    refuse_nonfinite(bad, job.where)
    return tuple(reports)


def _operate(job: Job, surgeon: Surgeon, name: str, put: Callable[[str, Tensor], None] | None) -> TensorReport:
    value, report = surgeon.smooth(job.plan.targets[name], job.source.read(name))
    if put is not None and report.changed:
        put(name, value)
    return report


def repair_state_dict(
    state_dict: Mapping[str, Any],
    options: RepairOptions | None = None,
    *,
    progress: ProgressHook | None = None,
) -> tuple[dict[str, Any], Report]:
    r"""Smooth the weights of a state dict in memory.

    Args:
        state_dict: values by name; never changed.
        options: what to smooth and how; None for the defaults.
        progress: told of every tensor.

    Returns:
        A new dict with the same keys in the same order, sharing every value that did not change, and the
        report.

    NaN or infinity anywhere raises :class:`NonFiniteError`, a choice without targets :class:`ArgumentError`.

    Example:
        >>> import torch
        >>> weight = torch.eye(64)
        >>> weight[0, 0] = 20.0
        >>> repaired, report = repair_state_dict({"layers.0.mlp.up_proj.weight": weight})
        >>> report.changed
        ('layers.0.mlp.up_proj.weight',)
    """
    options = options or RepairOptions()
    source, result, start = StateDictSource(state_dict), dict(state_dict), time.perf_counter()
    plan = make_plan(source, options.rules())
    aliases: dict[Any, list[str]] = {}
    for name, stored in source.tensors.items():
        aliases.setdefault(stored.storage, []).append(name)

    def put(name: str, value: Tensor) -> None:
        for alias in aliases[source.tensors[name].storage]:
            result[alias] = value

    tensors = run(Job(source, plan, options, "the state dict", progress), put)
    seconds = time.perf_counter() - start
    report = Report(None, None, "state_dict", options.to_dict(), tensors, plan.skipped, seconds)
    return result, report


def repair_checkpoint(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    options: RepairOptions | None = None,
    *,
    force: bool = False,
    dry_run: bool = False,
    progress: ProgressHook | None = None,
) -> Report:
    r"""Write a repaired copy of a checkpoint, and a report beside it.

    Bytes that are not repaired are identical in the copy. The input is never written to. The copy appears
    under its name when it is complete, or not at all.

    Args:
        path: the checkpoint.
        output: name of the copy; None for :func:`default_output`.
        options: what to smooth and how; None for the defaults.
        force: whether an existing output may be replaced.
        dry_run: compute and report, write nothing.
        progress: told of every step.

    Returns:
        The report.

    Errors are :class:`CheckpointError` (the checkpoint cannot be read, or the output not be written),
    :class:`NonFiniteError` (a tensor holds NaN or infinity) and :class:`ArgumentError` (no tensor is a
    target).
    """
    options, start = options or RepairOptions(), time.perf_counter()
    destination = default_output(path) if output is None else Path(output)
    with open_checkpoint(path) as layout:
        plan = make_plan(layout, options.rules())
        job = Job(layout, plan, options, str(path), progress)

        def report(tensors: tuple[TensorReport, ...]) -> Report:
            where = None if dry_run else str(destination)
            seconds = time.perf_counter() - start
            return Report(str(path), where, layout.format, options.to_dict(), tensors, plan.skipped, seconds)

        return report(run(job, None)) if dry_run else _write(job, layout, destination, force, report)


def _write(
    job: Job,
    layout: Layout,
    destination: Path,
    force: bool,
    make_report: Callable[[tuple[TensorReport, ...]], Report],
) -> Report:
    with (
        Editor(layout, destination, force) as editor,
        StagedFile(report_path(destination), force=True) as beside,
    ):
        total = sum(layout.stat(file).st_size for file in layout.files)
        done = 0

        def advance(step: int) -> None:
            nonlocal done
            done += step
            job.tell("copy", "", done, total)

        editor.copy(advance)
        report = make_report(run(job, editor.write))
        editor.finish()
        write_all(beside.fd, 0, report.to_json().encode())
        # The report first: no repaired checkpoint is ever seen without one.
        beside.publish()
        editor.publish()
    return report


def default_output(path: str | os.PathLike[str]) -> Path:
    r"""Where a repair writes unless it is told.

    Args:
        path: the checkpoint.

    Returns:
        ``x.repaired.safetensors`` for a file ``x.safetensors``, ``dir-repaired`` for a folder ``dir``.

    Example:
        >>> default_output("runs/x.safetensors").as_posix()
        'runs/x.repaired.safetensors'
    """
    where = Path(path)
    if where.is_dir():
        where = Path(os.path.abspath(where))  # so that "." has a name too
        return where.with_name(f"{where.name}-repaired")
    return where.with_name(f"{where.stem}.repaired{where.suffix}")
