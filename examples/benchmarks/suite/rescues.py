# SPDX-License-Identifier: Apache-2.0
"""Question 2: what becomes of dead checkpoints.

A checkpoint counts as dead when the run that simply goes on from it is dead by the suite's definition. *Learns again*:
the resumed run is not. *Ahead of the restart*: its final loss is below that of fresh weights trained for as many steps.
*Steps saved*: the step at which a run that never met the deadly rate, trained from scratch, first has the rescued run's
final loss, minus the steps the rescue took: what a restart would have to spend in addition to get there.
"""

import statistics
from dataclasses import dataclass, replace

from suite.records import Records, Result, learns, loss
from suite.spec import Spec

USUAL = (0, 20)
"""Late deaths that count in the tables: after the task's own number of steps at the deadly rate, and after 20."""


def dead_checkpoints(
    records: Records, death: str, dying: tuple[int, ...] = USUAL, task: str | None = None
) -> list[Spec]:
    """The checkpoints that are really dead.

    Args:
        records: all results.
        death: "early" or "late".
        dying: steps at the deadly rate; 0 for the task's own.
        task: only this one.

    Returns:
        The specifications of their continuations.
    """
    found = records.find(question="rescue", method="continue", death=death)
    asked = {spec: result for spec, result in found.items() if spec.dying in dying and task in {None, spec.task}}
    return [spec for spec, result in asked.items() if not learns(result)]


def alive(records: Records) -> set[tuple[str, str, int, int]]:
    """Checkpoints that turned out not to be dead: no remedy is tried on them.

    Args:
        records: all results.

    Returns:
        See :attr:`suite.spec.Spec.checkpoint`.
    """
    found = records.find(question="rescue", method="continue")
    return {spec.checkpoint for spec, result in found.items() if learns(result)}


def partner(records: Records, spec: Spec, method: str) -> Result | None:
    """Another remedy on the same checkpoint.

    Args:
        records: all results.
        spec: one remedy on it.
        method: the other.

    Returns:
        Its result, if there is one.
    """
    return records.first(**vars(replace(spec, method=method)))


@dataclass(frozen=True)
class Middle:
    """A median with its quartiles.

    Args:
        values: one number a checkpoint.
    """

    values: tuple[float, ...]

    @property
    def middle(self) -> float:
        """The median.

        Returns:
            NaN where there is nothing.
        """
        return statistics.median(self.values) if self.values else float("nan")

    def text(self, digits: int = 2) -> str:
        """As a table shows it.

        Args:
            digits: behind the point.

        Returns:
            Such as "-0.05 (-0.11 to +0.02)".
        """
        if len(self.values) < 2:
            return " ".join(f"{value:+.{digits}f}" for value in self.values) or "-"
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return f"{self.middle:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


@dataclass(frozen=True)
class Tally:
    """One remedy over many checkpoints.

    Args:
        count: checkpoints.
        alive: how many learn again.
        ahead: how many end below the restart.
        gap: the final loss minus the restart's, in nats.
        behind: the final loss minus that of a run that never diverged, at equal total steps.
        saved: the steps saved.
    """

    count: int
    alive: int
    ahead: int
    gap: Middle
    behind: Middle
    saved: Middle


def tally(records: Records, deaths: list[Spec], method: str, restart: str = "restart") -> Tally:
    """Count.

    Args:
        records: all results.
        deaths: dead checkpoints.
        method: the remedy.
        restart: what it is compared with.

    Returns:
        Its figures over those that have been measured.
    """
    rows = []
    for spec in deaths:
        mine, other, never = (partner(records, spec, name) for name in (method, restart, "never"))
        if mine and other and never:
            rows.append((learns(mine), loss(mine) - loss(other), loss(mine) - loss(never), saved(mine, never)))
    alive, gap, behind, steps = zip(*rows, strict=True) if rows else [()] * 4
    return Tally(len(rows), sum(alive), sum(g < 0 for g in gap), *map(Middle, (gap, behind, steps)))


def saved(mine: Result, never: Result) -> float:
    """What the rescue was worth.

    Args:
        mine: the rescued run.
        never: a run from scratch that met no deadly rate.

    Returns:
        Steps; negative if the restart gets there sooner.
    """
    curve, target = never["curve"], loss(mine)
    window = 5  # of ten steps each: the final loss is a mean of fifty, too
    means = [statistics.fmean(curve[max(0, i - window + 1) : i + 1]) for i in range(len(curve))]
    reached = next((10 * (i + 1) for i, mean in enumerate(means) if mean <= target), 10 * len(means))
    return float(reached - mine["steps"])
