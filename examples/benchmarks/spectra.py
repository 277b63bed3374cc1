# SPDX-License-Identifier: Apache-2.0
"""Time to smooth one matrix: ours against the ways a user would reach for, at equal or smaller measured error.

Every cell is a shape, a spectrum and an error target. Matrices have known singular vectors, so the error of the
smoothed matrix is measured exactly. Each rival gets `k` for nothing and the cheapest settings that reach the target,
found by trying; ours gets the target as `tol` and finds `k` itself, so its error is far below. `svd_lowrank` is then
measured once more, with the cheapest settings that reach the error that ours has. Runs of a cell are interleaved; the
least of each counts. Settings are tried once a matrix, a call of more than a second is not repeated, and a rival is
given up when one call took ten times our time and a fifth of a second more without reaching the target. `svd_lowrank`
is measured in every cell, the other rivals at 1e-3 up to the size of 2048 x 2048, `torch.linalg.svd` once, at 4096 x
4096.

    python examples/benchmarks/spectra.py                        # the whole grid: some 45 minutes on two cores
    python examples/benchmarks/spectra.py --shapes 512x512 --redo
    python examples/benchmarks/spectra.py --layer                # one layer of Llama-2-7B's shapes too
    python examples/benchmarks/spectra.py --model                # only all its layers, on a GPU of 40 GB or more
    python examples/benchmarks/spectra.py --report               # table and README from the results that are there

A cell that has its numbers is not measured again. Needs `pip install -e ".[test]"`.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path

import click
import torch
from decomposition.cases import SPECTRA, case
from decomposition.layer import layer
from decomposition.measuring import at_our_error, full_svd, measure, trials
from decomposition.model import model
from decomposition.report import put, table
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results" / "spectra.json"
GPU_RESULTS = RESULTS.with_name("spectra-gpu.json")
README = RESULTS.parents[3] / "README.md"
SHAPES = "512x512,1024x1024,768x3072,2048x2048,4096x4096,8192x2048,4096x11008"
FULL = "4096x4096"
RIVAL = "svd_lowrank"
_EVERY_RIVAL_UP_TO = 2048**2
_WIDTH = 170


def processor() -> str:
    """What the numbers are of, and which of its registers torch uses."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"


def name(cell: dict) -> tuple[str, str, float]:
    """What tells cells apart."""
    return cell["shape"], cell["spectrum"], cell["target"]


def order(cell: dict) -> tuple[int, int, float]:
    """The order of the grid."""
    known = SHAPES.split(",")
    shape = known.index(cell["shape"]) if cell["shape"] in known else len(known)
    return shape, SPECTRA.index(cell["spectrum"]), -cell["target"]


def fill(report: dict, grid: list[tuple[str, str, float]], repeats: int, out: Path) -> None:
    """Measure the cells that are missing, each saved as soon as it is there."""
    made, of, rivals = None, None, {}
    for shape, kind, target in grid:
        cell = next((cell for cell in report["cells"] if name(cell) == (shape, kind, target)), None)
        if cell is not None and "at_our_error" in cell:
            continue
        m, n = map(int, shape.split("x"))
        if of != (shape, kind):
            made, of = case(kind, m, n), (shape, kind)
            rivals = trials(made)
        if cell is None:
            every = target == 1e-3 and m * n <= _EVERY_RIVAL_UP_TO
            numbers = measure(made, target, repeats, rivals if every else {RIVAL: rivals[RIVAL]})
            cell = {"shape": shape, "spectrum": kind, "target": target} | numbers
            report["cells"].append(cell)
        cell["at_our_error"] = at_our_error(made, target, repeats, rivals[RIVAL])
        if shape == FULL and "full_svd" not in report:
            report["full_svd"] = {"shape": shape, "s": full_svd(made)}
        save(report, out)


def save(report: dict, out: Path) -> None:
    """Write the JSON, cells in the order of the grid."""
    report["cells"].sort(key=order)
    if "full_svd" in report:
        times = [cell["ms"] / 1e3 for cell in report["cells"] if cell["shape"] == FULL]
        speeds = [report["full_svd"]["s"] / seconds for seconds in times]
        report["full_svd"] |= {"least": min(speeds), "most": max(speeds)}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def shown(report: dict) -> Table:
    """All cells, a line each."""
    columns = ("shape", "spectrum", "k", "target", "ms", "warm", "error", "bound", "others' time / ours")
    lines = Table(*columns, title=report["versions"])
    for cell in report["cells"]:
        others = ", ".join(f"{rival} {ratio:.2f}" for rival, ratio in cell["ratios"].items())
        row = (cell["shape"], cell["spectrum"], cell["k"], cell["target"], f"{cell['ms']:.2f}")
        row += (f"{cell['warm_ms']:.2f}", f"{cell['error']:.1e}", f"{cell['bound']:.1e}")
        lines.add_row(*map(str, row), others or "none reached it")
    return lines


@click.command(help=__doc__.split("\n")[0])
@click.option("--shapes", default=SHAPES, show_default=True, help="Comma-separated m x n.")
@click.option("--spectra", default=",".join(SPECTRA), show_default=True, help="Comma-separated names.")
@click.option("--targets", default="1e-2,1e-3,1e-4", show_default=True, help="Error of the smoothed matrix.")
@click.option("--repeats", default=5, show_default=True, help="Interleaved runs a cell; the least time counts.")
@click.option("--threads", default=2, show_default=True, help="torch threads.")
@click.option("--redo", is_flag=True, help="Measure cells again that have their numbers.")
@click.option("--layer", "with_layer", is_flag=True, help="Add one layer of Llama-2-7B's shapes.")
@click.option("--model", "gpu_results", type=click.Path(path_type=Path), is_flag=False, flag_value=GPU_RESULTS,
              help="Measure all layers on a GPU, and nothing else; the file for the numbers.")  # fmt: skip
@click.option("--report", "only_report", is_flag=True, help="Tables from the results; measure nothing.")
@click.option("--json", "out", type=click.Path(path_type=Path), default=RESULTS, help="Where the numbers go.")
def main(
    shapes: str, spectra: str, targets: str, repeats: int, threads: int, redo: bool, with_layer: bool,
    gpu_results: Path | None, only_report: bool, out: Path,
) -> None:  # fmt: skip
    """Measure what is missing, then print the table and write the README's."""
    if gpu_results is not None:
        if not torch.cuda.is_available():
            raise click.UsageError("--model needs a GPU; --layer is one layer on a CPU")
        gpu_results.write_text(json.dumps(model(1e-2), indent=1) + "\n", encoding="utf-8")
        only_report = True
    torch.set_num_threads(threads)
    grid = [(s, k, float(t)) for s in shapes.split(",") for k in spectra.split(",") for t in targets.split(",")]
    report = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"cells": []}
    if not only_report:
        report["versions"] = f"torch {torch.__version__}, {processor()}, {threads} threads"
        if redo:
            report["cells"] = [cell for cell in report["cells"] if name(cell) not in grid]
            if FULL in shapes.split(","):
                report.pop("full_svd", None)
        fill(report, grid, repeats, out)
        if with_layer:
            report["layer"] = layer(1e-2, threads)
        save(report, out)
    Console(width=_WIDTH).print(shown(report))
    gpu = json.loads(GPU_RESULTS.read_text(encoding="utf-8")) if GPU_RESULTS.exists() else None
    click.echo(table(report, gpu))
    if out == RESULTS:
        put(README, report, gpu)


if __name__ == "__main__":
    main()
