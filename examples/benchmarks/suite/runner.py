# SPDX-License-Identifier: Apache-2.0
"""Do what is missing, over processes of one thread each, and write every result down as it comes."""

import itertools
import logging
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from suite.deaths import dead
from suite.methods import METHODS
from suite.records import Records, learns
from suite.remedies import resume
from suite.rescues import alive
from suite.spec import Spec
from suite.states import state
from suite.store import Store, origin
from suite.task import tasks
from suite.training import outcome, train

Result = tuple[Spec, dict[str, object]]


def measure(spec: Spec) -> dict[str, object]:
    """One training run.

    Args:
        spec: which.

    Returns:
        What is kept of it.
    """
    if spec.question == "state":
        return state(spec, dead(*spec.checkpoint))
    if spec.question != "range":
        return resume(spec, dead(*spec.checkpoint))
    task = tasks()[spec.task]
    return outcome(task, *train(task, METHODS[spec.method](), spec.seed, task.steps, spec.multiple))


def settle_worker() -> None:
    """Set up a process: one thread, and triggers are counted, not told."""
    torch.set_num_threads(1)
    logging.getLogger("pss_param").setLevel(logging.ERROR)


def measure_all(specs: list[Spec]) -> list[Result]:
    """Several runs in one process.

    Args:
        specs: runs that start from the same checkpoint.

    Returns:
        Their results; no more than the first where that shows the checkpoint to be alive.
    """
    results: list[Result] = []
    for spec in specs:
        results.append((spec, measure(spec)))
        if spec.question == "rescue" and spec.method == "continue" and learns(results[-1][1]):
            break  # it is not dead, and there is nothing to remedy
    return results


def jobs(specs: Iterable[Spec]) -> Iterator[list[Spec]]:
    """Put together what starts from the same checkpoint, so that it dies only once.

    Args:
        specs: in the order of their importance.

    Yields:
        list[Spec]: neighbours that belong together.
    """
    for (question, _), group in itertools.groupby(specs, key=lambda spec: (spec.question, spec.checkpoint)):
        if question == "range":
            yield from ([spec] for spec in group)
        else:
            yield list(group)


def run(specs: list[Spec], store: Store, workers: int, console: Console) -> None:
    """Measure what has no record yet; can be interrupted at any time.

    Args:
        specs: what is wanted.
        store: where results go.
        workers: processes.
        console: for the bar.

    An exception in a run is an error of the suite, not a data point: it ends the suite.
    """
    living, where = alive(Records(store.records())), origin()
    missing = [s for s in store.missing(specs) if s.question != "rescue" or s.checkpoint not in living]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, settle_worker)
    with Progress(*columns, console=console) as bar, pool:
        line, waiting = bar.add_task("runs", total=len(missing)), jobs(missing)
        pending: set[Future[list[Result]]] = set()
        try:
            while True:
                # Not all at once: an interrupt then waits for a few runs, not for thousands.
                pending |= {
                    pool.submit(measure_all, job) for job in itertools.islice(waiting, 2 * workers - len(pending))
                }
                if not pending:
                    return
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    store.add(future.result(), where)
                    bar.advance(line, len(future.result()))
        finally:
            pool.shutdown(cancel_futures=True)
