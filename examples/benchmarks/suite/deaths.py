# SPDX-License-Identifier: Apache-2.0
"""Dead checkpoints, made to order.

*Early*: trained from scratch at the task's deadly rate. *Late*: trained to health at the moderate rate, then some tens
of steps at a rate that kills. What a run would have on disk is kept: model, optimizer, and the same 100 and 200 steps
before. Whether a checkpoint is really dead is not decided here but measured: the remedy "continue" trains on from it.
"""

import copy
import functools
from dataclasses import dataclass
from typing import Any

from suite.methods import METHODS
from suite.task import Task, tasks
from suite.training import Run, fresh, go_on

EARLY_STEPS = 150


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds.

    Args:
        model: state dict.
        optimizer: state dict.
        step: steps done.
    """

    model: dict[str, Any]
    optimizer: dict[str, Any]
    step: int


@dataclass(frozen=True)
class Dead:
    """A dead run and what it left behind.

    Args:
        last: the checkpoint at its end.
        healthy: the last one before the rate was raised; of an early death the fresh weights.
        back: the checkpoints 100 and 200 steps before the end, where there are any.
    """

    last: Saved
    healthy: Saved
    back: dict[int, Saved]


def saved(run: Run) -> Saved:
    """Write a checkpoint, in memory.

    Args:
        run: a run.

    Returns:
        Its content.
    """
    return Saved(copy.deepcopy(run.model.state_dict()), copy.deepcopy(run.optimizer.state_dict()), run.step)


def phases(task: Task, death: str, dying: int) -> tuple[int, int, float]:
    """How a death comes about.

    Args:
        task: the task.
        death: "early" or "late".
        dying: steps at the deadly rate; 0 for the usual.

    Returns:
        Healthy steps, steps at the deadly rate, that rate as a multiple of the task's.
    """
    if death == "early":
        return 0, dying or EARLY_STEPS, task.early_lr / task.lr
    return task.steps, dying or task.kill_steps, task.kill_lr / task.lr


@functools.lru_cache(maxsize=1)
def dead(name: str, death: str, seed: int, dying: int) -> Dead:
    """Make a dead checkpoint.

    Args:
        name: of the task.
        death: "early" or "late".
        seed: of weights and data.
        dying: steps at the deadly rate; 0 for the usual.

    Returns:
        The checkpoint and its past.
    """
    task, method = tasks()[name], METHODS["nothing"]()
    before, after, multiple = phases(task, death, dying)
    run, past, keep = fresh(task, method, seed), {}, {before + after - 100: 100, before + after - 200: 200}
    method.start(run.model, run.optimizer, before + after)
    healthy = saved(run)
    for stop in sorted({before, before + after, *(step for step in keep if step >= 0)}):
        for begin, end, rate in ((0, before, 1.0), (before, before + after, multiple)):
            if begin <= run.step < end and run.step < stop:
                go_on(task, run, method, min(stop, end) - run.step, rate)
        if run.step == before:
            healthy = saved(run)
        if run.step in keep:
            past[keep[run.step]] = saved(run)
    return Dead(saved(run), healthy, past)
