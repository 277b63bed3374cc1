# SPDX-License-Identifier: Apache-2.0
"""Does it work, against everything else a person could do, on networks that really diverge?

    python examples/benchmarks/stability.py --quick     # a quarter of an hour on two cores
    python examples/benchmarks/stability.py             # hours; can be stopped and taken up again
    python examples/benchmarks/stability.py --report    # tables and plots from the results that are there

Networks, methods and questions stand in `suite/`; results go to `results/stability.jsonl`, one line a run, tables to
`results/stability.md`, plots beside it. A run that has its line is not done again. Needs `pip install -e ".[test]"`.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from suite.spec import Spec

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # before torch: parallel over runs, not inside them

RESULTS = Path(__file__).parent / "results"
README = RESULTS.parents[2] / "README.md"


@click.command(help=__doc__.split("\n")[0])
@click.option("--quick", is_flag=True, help="The headline questions only.")
@click.option("--report", is_flag=True, help="Write tables and plots from the results; measure nothing.")
@click.option("--workers", default=os.cpu_count(), show_default=True, help="Processes.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, help="Folder of the results.")
@click.option("--redo", multiple=True, metavar="METHOD", help="Forget the results of a method first.")
@click.option("--only", multiple=True, metavar="WORD", help="Runs whose question, task or method has this name.")
def main(quick: bool, report: bool, workers: int, results: Path, redo: tuple[str, ...], only: tuple[str, ...]) -> None:
    """Measure what is missing, then write tables and plots."""
    from rich.console import Console
    from suite.headline import put
    from suite.plans import PROFILES, further
    from suite.records import Records
    from suite.report import write
    from suite.runner import run
    from suite.store import Store

    store, console = Store(results / "stability.jsonl"), Console(stderr=True)
    for method in redo:
        console.print(f"{method}: {store.drop(method)} results forgotten")
    if not report:
        specs = PROFILES["quick" if quick else "full"]()
        run(_chosen(specs, only), store, workers, console)
        while not quick and (specs := _chosen(further(Records(store.records())), only)):
            run(specs, store, workers, console)
    for path in write(store, results):
        console.print(f"wrote {path}")
    if results == RESULTS:
        put(README, Records(store.records()))
        console.print(f"wrote the figures of {README}")


def _chosen(specs: "list[Spec]", words: tuple[str, ...]) -> "list[Spec]":
    return [spec for spec in specs if set(words) <= {spec.question, spec.task, spec.method}]


if __name__ == "__main__":
    main()
