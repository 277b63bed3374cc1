# SPDX-License-Identifier: Apache-2.0
r"""``pss-repair CKPT``."""

from pathlib import Path
from typing import Any

import click

from pss_param.counting import counted
from pss_param.options import RepairOptions
from pss_param.repair import repair_checkpoint
from pss_param.report import Report, TensorReport, report_path

from . import options
from .console import progress_bar, say, stdout
from .drift import show_drift
from .tables import Listing


@click.command(hidden=True)
@options.checkpoint
@options.output
@options.force
@click.option("--dry-run", is_flag=True, help="Compute and report, write nothing.")
@options.as_json
@options.smoothing
@options.recovery
@options.selection
def repair(ckpt: str, output: str | None, force: bool, dry_run: bool, as_json: bool, **choices: Any) -> None:
    """Write a repaired copy of the checkpoint CKPT, and a report beside it."""
    with progress_bar("reading") as progress:
        report = repair_checkpoint(
            ckpt, output, RepairOptions(**choices), force=force, dry_run=dry_run, progress=progress
        )
    if as_json:
        click.echo(report.to_json(), nl=False)
    else:
        _show(report)
    _close(report)


def _show(report: Report) -> None:
    numbers = ("stable rank", "spectral norm", "k", "change")
    rows = Listing(("tensor", "role", "shape", *numbers, "note"), numbers, spare=("shape", "role"), aside="note")
    for tensor in report.tensors:
        rows.add(*_cells(tensor), style="" if tensor.changed else "dim")
    stdout().print(rows)
    if report.drift:
        stdout().print()
        show_drift(report.drift)
    for name, restored in report.restored.items():
        say(f"took {name} from the reference: {restored.nonfinite} of its values were NaN or infinite")
    if report.reason:
        say(report.reason)
    if report.vectors:
        one, many = "norm or bias is back at its initial value", "norms and biases are back at their initial values"
        say(counted(len(report.vectors), one, many))
    if report.options["strength"] == "deep" and not report.optimizer.states:
        say("resume with a new optimizer: old moments, if you have them, are those of the run that died")
    if report.optimizer.reset:
        say(f"optimizer: the state of {counted(len(report.optimizer.reset), 'parameter')} is initial again")
    if report.optimizer.masters:
        copies = counted(len(report.optimizer.masters), "master copy", "master copies")
        say(f"optimizer: {copies} got the same correction")


def _cells(tensor: TensorReport) -> tuple[str, ...]:
    worst = tensor.worst
    several = f" (worst of {len(tensor.matrices)}: {worst.part})" if len(tensor.matrices) > 1 else ""
    return (
        tensor.name + several,
        tensor.role,
        "x".join(map(str, tensor.shape)),
        "{:.2f} > {:.2f}".format(*worst.stable_rank),
        "{:.3g} > {:.3g}".format(*worst.spectral_norm),
        str(worst.k),
        f"{tensor.relative_change:.1%}",
        worst.note or ("" if worst.converged else f"residual {worst.residual:.1e}"),
    )


def _close(report: Report) -> None:
    count = f"{len(report.changed)} of {counted(len(report.tensors), 'target')} changed"
    others = f"{counted(len(report.skipped), 'other tensor')} untouched"
    if report.output is None:
        say(f"dry run: {count}, {others}; nothing was written ({report.seconds:.1f} s)")
    else:
        say(f"{count}, {others} ({report.seconds:.1f} s)")
        checked = ", verified" if report.options["verify"] else ""
        say(f"wrote {report.output} and {report_path(Path(report.output)).name}{checked}")
    for note in report.notes:
        say(note)
