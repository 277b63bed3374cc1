# SPDX-License-Identifier: Apache-2.0
r"""``pss-repair scan CKPT``."""

from typing import Any

import click

from pss_param.counting import counted
from pss_param.options import RepairOptions
from pss_param.scan import ScanReport, ScanRow, scan_checkpoint

from . import options
from .console import progress_bar, say, stdout
from .drift import show_drift
from .tables import Listing

DAMAGE_FOUND = 3


@click.command(short_help="Look for damage; exit with 3 if there is any.")
@options.checkpoint
@click.option("--skipped", is_flag=True, help="List the tensors that are no targets, with the reasons.")
@options.reference
@options.as_json
@options.selection
def scan(ckpt: str, skipped: bool, as_json: bool, **choices: Any) -> None:
    """Show stable rank and spectral norm of every target, and what stands out.

    Damage is: NaN or infinity, masks and what is excluded apart; a median stable rank below 3; a matrix that has at
    most half the stable rank and at least twice the spectral norm of its peers in other layers, both by far more
    than they differ among themselves; or, with --reference, stable ranks whose median fell below half of the healthy
    ones. A low stable rank alone is no damage, and neither are matrices that have all outgrown fresh ones: after very
    long training healthy ones have too. How far they have, and what a repair would make of it, is printed. Exits
    with 3 if there is damage, 0 if there is none.
    """
    with progress_bar("reading") as progress:
        report = scan_checkpoint(ckpt, RepairOptions(**choices), progress=progress)
    if as_json:
        click.echo(report.to_json(), nl=False)
    else:
        _show(report, skipped)
    _close(report)
    click.get_current_context().exit(DAMAGE_FOUND if report.damaged else 0)


def _show(report: ScanReport, skipped: bool) -> None:
    numbers = ("SR", "S[0]")
    columns = ("tensor", "role", "shape", *numbers, "stands out")
    rows = Listing(columns, numbers, spare=("shape", "role"), aside="stands out")
    for row in report.rows:
        rows.add(*_cells(row), style="bold red" if row.damaged else "")
    for name, count in report.nonfinite.items():
        rows.add(name, "", "", "", "", f"{count} values are NaN or infinite", style="bold red")
    stdout().print(rows)
    if report.drift:
        stdout().print()
        show_drift(report.drift)
    if skipped and report.skipped:
        others = Listing(("not scanned", "reason"), aside="reason")
        for name, reason in report.skipped.items():
            others.add(name, reason)
        stdout().print()
        stdout().print(others)


def _cells(row: ScanRow) -> tuple[str, ...]:
    name = f"{row.name} {row.part}".rstrip()
    return (
        name,
        row.role,
        "x".join(map(str, row.shape)),
        f"{row.stable_rank:.2f}",
        f"{row.spectral_norm:.3g}",
        row.note,
    )


def _close(report: ScanReport) -> None:
    level = report.median_stable_rank
    middle = "" if level is None else f", median stable rank {level:.2f}"
    matrices = counted(len(report.rows), "matrix", "matrices")
    say(f"{matrices}{middle}, {counted(len(report.skipped), 'other tensor')} not scanned")
    for note in report.notes:
        say(note)
    for finding in report.findings:
        say(f"damage: {finding}")
    if not report.findings:
        further = "" if report.drift else "; --reference GOOD compares with a healthy checkpoint"
        say(f"nothing stands out from its peers{further}")
    if report.reason:
        say(f"a repair with the same options would be {report.reason}")
