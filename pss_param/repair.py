# SPDX-License-Identifier: Apache-2.0
r"""Offline repair: choose the targets, smooth them one at a time, report.

This module knows names and tensors; where their bytes lie is the business of :mod:`pss_param.checkpoint`.
"""

import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pss_param.checkpoint import Editor, Layout, StagedFile, open_checkpoint
from pss_param.checkpoint.transfer import write_all
from pss_param.operation import Job, Outcome, operate
from pss_param.optimizer_edit import OptimizerEditor
from pss_param.options import ProgressHook, RepairOptions
from pss_param.other_sets import note_other_sets
from pss_param.plan import StateDictSource, make_plan
from pss_param.report import OptimizerReport, Report, report_path
from pss_param.resume_rate import note_rate
from pss_param.strength import settle
from pss_param.surgery import digest


def repair_state_dict(
    state_dict: Mapping[str, Any],
    options: RepairOptions | None = None,
    *,
    progress: ProgressHook | None = None,
) -> tuple[dict[str, Any], Report]:
    r"""Smooth the weights of a state dict in memory.

    Args:
        state_dict: values by name; never changed. What is no dense tensor is passed through.
        options: what to smooth and how; None for the defaults.
        progress: told of every tensor.

    Returns:
        A new dict with the same keys in the same order, sharing every value that did not change, and the
        report.

    NaN or infinity raises :class:`NonFiniteError`, but for masks and what is excluded (see
    :mod:`pss_param.by_design`); a choice without targets raises :class:`ArgumentError`.

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
    options, reason = settle(source, options)
    plan = make_plan(source, options.rules(), options.deep)
    aliases: dict[Any, list[str]] = {}
    for name, stored in source.tensors.items():
        aliases.setdefault(stored.storage, []).append(name)

    def put(name: str, value: Tensor) -> None:
        for alias in aliases[source.tensors[name].storage]:
            result[alias] = value

    outcome = operate(Job(source, plan, options, "the state dict", progress), put)
    report = Report(None, None, "state_dict", options.to_dict(), outcome.tensors, {}, 0.0, reason=reason)
    return result, _completed(report, outcome, start)


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
        path: the checkpoint, a file or a folder.
        output: name of the copy; None for :func:`default_output`.
        options: what to smooth and how; None for the defaults.
        force: whether an existing output may be replaced.
        dry_run: compute and report, write nothing.
        progress: told of every step.

    Returns:
        The report.

    Errors are :class:`CheckpointError` (the checkpoint cannot be read, or the output not be written),
    :class:`NonFiniteError` (a tensor holds NaN or infinity, and not by design: :mod:`pss_param.by_design`) and
    :class:`ArgumentError` (no tensor is a target).
    """
    options, start = options or RepairOptions(), time.perf_counter()
    destination = default_output(path) if output is None else Path(output)
    with open_checkpoint(path) as layout:
        auto = options.optimizer == "auto"
        optimizers = OptimizerEditor(layout, "keep" if auto else options.optimizer, options.param_order)
        options, reason = settle(layout, options)
        optimizers, kept = optimizers.anew() if auto and options.deep else (optimizers, "")
        options, reason = replace(options, optimizer=optimizers.mode), "; ".join(filter(None, (reason, kept)))
        job = Job(layout, make_plan(layout, options.rules(), options.deep), options, str(path), progress, optimizers)
        where = None if dry_run else str(destination)
        others = note_other_sets(layout, job.plan.targets, optimizers.states)
        notes = (*layout.notes, *others, *note_rate(layout.content))
        report = Report(str(path), where, layout.format, options.to_dict(), (), {}, 0.0, reason=reason, notes=notes)
        if dry_run:
            return _completed(report, _with_optimizer(job, optimizers, None), start)
        return _write(job, layout, optimizers, (destination, force), lambda found: _completed(report, found, start))


def _completed(report: Report, outcome: Outcome, start: float) -> Report:
    return replace(
        report,
        tensors=outcome.tensors,
        skipped=outcome.skipped,
        restored=outcome.restored,
        drift=outcome.drift,
        optimizer=outcome.optimizer,
        vectors=outcome.vectors,
        notes=(*outcome.notes, *report.notes),
        seconds=time.perf_counter() - start,
    )


def _write(
    job: Job,
    layout: Layout,
    optimizers: OptimizerEditor,
    where: tuple[Path, bool],
    make_report: Callable[[Outcome], Report],
) -> Report:
    destination, force = where
    with (
        Editor(layout, destination, force) as editor,
        StagedFile(report_path(destination), force=True) as beside,
    ):
        total = sum(layout.stat(file).st_size for file in layout.files)
        changing = {*job.plan.targets, *job.plan.vectors, *optimizers.changing}
        job = replace(job, counts=editor.copy(job.counter("copy", total), job.options.verify, changing))
        report = make_report(_with_optimizer(job, optimizers, editor.write))
        editor.finish(job.options.verify, job.counter("verify", editor.unchecked_bytes))
        write_all(beside.fd, 0, report.to_json().encode())
        editor.check_free()
        # The report first: no repaired checkpoint is ever seen without one.
        beside.publish()
        with ExitStack() as undo:
            undo.callback(_remove_lonely_report, destination)
            editor.publish()
            undo.pop_all()
    return report


def _remove_lonely_report(destination: Path) -> None:
    if not destination.exists():
        report_path(destination).unlink(missing_ok=True)


def _with_optimizer(job: Job, optimizers: OptimizerEditor, put: Callable[[str, Tensor], None] | None) -> Outcome:
    written: dict[str, str] = {}

    def note(name: str, value: Tensor) -> None:
        if name not in job.source.tensors:
            written[name] = digest(value)
        if put is not None:
            put(name, value)

    optimizers.check([job.names(name) for name in (*job.plan.targets, *job.plan.vectors)], job.counts)
    outcome = operate(job, note)
    repaired = [*(t.name for t in outcome.tensors if t.changed), *outcome.restored, *outcome.vectors]
    reset = optimizers.reset([job.names(name) for name in repaired], note)
    report = OptimizerReport(
        job.options.optimizer, len(optimizers.states), reset, outcome.masters, written, optimizers.origin
    )
    return replace(outcome, optimizer=report)


def default_output(path: str | os.PathLike[str]) -> Path:
    r"""Where a repair writes unless it is told.

    Args:
        path: the checkpoint.

    Returns:
        ``x.repaired.safetensors`` for a file ``x.safetensors``, ``dir-repaired`` for a folder ``dir``; relative where
        the path is.

    Example:
        >>> default_output("runs/x.safetensors").as_posix()
        'runs/x.repaired.safetensors'
    """
    where = Path(path)
    if where.is_dir():
        whole = Path(os.path.abspath(where))  # so that "." has a name too
        beside = whole.with_name(f"{whole.name}-repaired")
        return beside if where.is_absolute() else Path(os.path.relpath(beside))
    return where.with_name(f"{where.stem}.repaired{where.suffix}")
