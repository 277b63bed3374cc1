# SPDX-License-Identifier: Apache-2.0
r"""``pss-repair compare A B``."""

from typing import Any

import click

from pss_param.compare import CompareReport, compare_checkpoints
from pss_param.counting import counted
from pss_param.options import RepairOptions

from . import options
from .console import progress_bar, say
from .drift import show_drift


@click.command(short_help="Two checkpoints of one model beside each other.")
@click.argument("first", type=click.Path())
@click.argument("second", type=click.Path())
@options.as_json
@options.selection
def compare(first: str, second: str, as_json: bool, **choices: Any) -> None:
    """Show stable rank, spectral norm and distance of every target in FIRST (the reference) and SECOND.

    The checkpoints may have different formats, and one of them a prefix before all names. Lines whose stable
    rank fell to less than half are marked.
    """
    with progress_bar("reading") as progress:
        report = compare_checkpoints(first, second, RepairOptions(**choices), progress=progress)
    if as_json:
        click.echo(report.to_json(), nl=False)
    else:
        show_drift(report.rows)
    _close(report)


def _close(report: CompareReport) -> None:
    others = counted(len(report.others), "other tensor differs", "other tensors differ")
    say(f"{counted(len(report.rows), 'target')}, {others}, {counted(report.identical, 'is', 'are')} equal")
    for path, names in zip(report.sources, report.missing, strict=True):
        if names:
            say(f"only {path} has {counted(len(names), 'tensor')}, first {names[0]}")
    for name, reason in report.unlike.items():
        say(f"not compared: {name}: {reason}")
    for name, counts in report.nonfinite.items():
        say(f"not compared: {name} holds {counts[0]} and {counts[1]} NaN or infinite values")
