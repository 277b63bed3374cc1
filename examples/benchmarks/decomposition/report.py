# SPDX-License-Identifier: Apache-2.0
"""The README's table, from the JSON of the measurements and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from .cases import SPECTRA
from .methods import OTHERS

BEGIN, END = "<!-- spectra: begin -->", "<!-- spectra: end -->"
NAMES = {
    "power 0.5": "`S ~ j^-0.5`",
    "power 1": "`S ~ 1/j`",
    "trained": "trained: many values crowd around the edge",
    "collapsed": "collapsed: a few values over a flat bulk",
    "flat": "fresh: nothing stands out",
}


def mean(ratios: Iterable[float]) -> float:
    """Geometric mean."""
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def ratios(cells: list[dict], name: str) -> list[float]:
    """The rival's time over ours, in the cells where it reached the target."""
    return [cell["ratios"][name] for cell in cells if name in cell["ratios"]]


def misses(cells: list[dict], name: str) -> list[float]:
    """The time of its longest call over ours, in the cells where none of its settings reached the target."""
    return [cell["missed"][name] for cell in cells if name in cell["missed"]]


def line(label: str, cells: list[dict]) -> str:
    """One row: our times, and how often and how much faster than ``svd_lowrank``."""
    seen = ratios(cells, "svd_lowrank")
    times = sorted(cell["ms"] for cell in cells)
    missed = misses(cells, "svd_lowrank")
    compared = f"{mean(seen):.2f} | {min(seen):.2f} | {max(seen):.1f}" if seen else "- | - | -"
    with_missed = f"{mean([*seen, *missed]):.2f} | {len(missed)}"
    equal = [cell["at_our_error"]["ratio"] for cell in cells if "at_our_error" in cell]
    alike = f"{mean(equal):.2f} | {min(equal):.2f}" if equal else "- | -"
    return f"| {label} | {len(cells)} | {times[0]:.1f} to {times[-1]:.0f} | {compared} | {with_missed} | {alike} |"


def _missed_at_ours(cells: list[dict]) -> str:
    seen = [cell["at_our_error"] for cell in cells if "at_our_error" in cell]
    missed = sum(not each["reached"] for each in seen)
    return f"`svd_lowrank` was measured in {len(seen)} cells and missed it in {missed}, which count as its longest try"


def on_gpu(found: dict) -> str:
    """All layers on a GPU, as a sentence."""
    rows, count = found["rows"], sum(row["count"] for row in found["rows"])
    bound, error = (max(row[key] for row in rows) for key in ("bound", "error"))
    return (
        f"All {count} block matrices of Llama-2-7B's shapes on one {found['device']} (torch {found['torch']}), "
        f"float32, stable ranks near {rows[0]['stable_rank']:.0f}, at {found['tol']:g}: **{found['s']:.2f} s**; "
        f"reading their bytes once takes {1e3 * found['read_s']:.0f} ms, and {100 * found['roofline_share']:.0f} % of "
        f"the rate of a large matrix product was reached. Largest bound {bound:.1e}, measured errors up to {error:.1e}."
    )


def table(report: dict, gpu: dict | None = None) -> str:
    """The README's section between its markers.

    Args:
        report: what ``spectra.json`` holds.
        gpu: what ``spectra-gpu.json`` holds, if it is there.

    Returns:
        Markdown.
    """
    cells = report["cells"]
    shapes = list(dict.fromkeys(cell["shape"] for cell in cells))
    by_kind = {kind: [cell for cell in cells if cell["spectrum"] == kind] for kind in SPECTRA}
    rows = [line(NAMES[kind], some) for kind, some in by_kind.items() if some]
    others = [
        f"{name} {mean(found):.1f} (worst {min(found):.2f}, {len(found)} cells)"
        for name in OTHERS
        if (found := ratios(cells, name))
    ]
    text = [
        f"{report['versions']}; shapes {', '.join(shapes)}; error targets 1e-2, 1e-3, 1e-4.",
        "",
        "| spectrum | cells | our ms | `svd_lowrank` / ours, mean where it got there | worst | best "
        "| mean, a miss counted as its longest try | targets missed | at the error that ours has, mean | worst |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *rows,
        line("**all**", cells),
        "",
        f"Ours is asked for the target and has less error than that; at that error {_missed_at_ours(cells)}.",
        f"Others' time over ours, geometric mean: {'; '.join(others)}.",
    ]
    if "full_svd" in report:
        full = report["full_svd"]
        text.append(
            f"`torch.linalg.svd` at {full['shape']} took {full['s']:.1f} s: "
            f"{full['least']:.0f} to {full['most']:.0f} times ours, by spectrum and target."
        )
    if "layer" in report:
        found = report["layer"]
        text.append(
            f"The {len(found['rows'])} matrices of one layer of Llama-2-7B's shapes, stable ranks near 20, at "
            f"{found['tol']:g}: {found['s']:.1f} s, as long as reading them {found['s'] / found['read_s']:.0f} times."
        )
    if gpu is not None:
        text += ["", on_gpu(gpu)]
    return "\n".join(text)


def put(readme: Path, report: dict, gpu: dict | None = None) -> None:
    """Write the table between the markers of a README."""
    text = readme.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN, 1)
    readme.write_text(f"{head}{BEGIN}\n{table(report, gpu)}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")
