# SPDX-License-Identifier: Apache-2.0
"""Question 1: the range of learning rates that learn.

*Range*: the largest multiple up to which, from the task's own rate on, every rate of the grid learns with most seeds.
Only seeds for which the whole grid was measured count.
*Sensitivity*: the mean over the grid of `min(loss, trivial) - best`, with the best loss of the same method and seed
(Wortsman et al., arXiv 2309.14322; the initial loss there is the trivial one here).
"""

import statistics

from suite.records import Records, Spread, learns, loss

GRID = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Learning rates, as multiples of the task's own."""

LOW = (0.25,)
"""Asked of the unguarded run and the default too, so that the best rate lies inside of what was tried."""

FURTHER = (64.0, 128.0, 256.0, 512.0)
"""Where a method still learns at the end of the grid, it is asked for more, until it does not."""


def complete(records: Records, task: str, method: str) -> list[int]:
    """The seeds for which a method was measured at every rate of the grid.

    Args:
        records: all results.
        task: its name.
        method: its name.

    Returns:
        Seeds, in order.
    """
    asked: dict[int, set[float]] = {}
    for spec in records.find(question="range", task=task, method=method):
        asked.setdefault(spec.seed, set()).add(spec.multiple)
    return sorted(seed for seed, multiples in asked.items() if multiples >= set(GRID))


def largest(records: Records, task: str, method: str, seeds: list[int] | None = None) -> float:
    """The range of a method on a task.

    Args:
        records: all results.
        task: its name.
        method: its name.
        seeds: of those with the whole grid only these.

    Returns:
        A multiple of the task's rate; 0 if not even that rate learns, NaN if the grid was not measured.
    """
    there = [seed for seed in complete(records, task, method) if seeds is None or seed in seeds]
    found = records.find(question="range", task=task, method=method)
    found = {spec: result for spec, result in found.items() if spec.seed in there and spec.multiple >= 1.0}
    reached = 0.0 if found else float("nan")
    for multiple in sorted({spec.multiple for spec in found}):
        verdicts = [learns(result) for spec, result in found.items() if spec.multiple == multiple]
        if 2 * sum(verdicts) <= len(verdicts):
            break
        reached = multiple
    return reached


def open_ended(records: Records, task: str, method: str) -> bool:
    """Whether a method still learnt at the highest rate that it was asked for.

    Args:
        records: all results.
        task: its name.
        method: its name.

    Returns:
        The answer; its range may be larger then.
    """
    asked = records.values("multiple", question="range", task=task, method=method)
    return bool(asked) and largest(records, task, method) == max(asked)


def sensitivity(records: Records, task: str, method: str) -> Spread:
    """The price of a wrong learning rate, in nats.

    Args:
        records: all results.
        task: its name.
        method: its name.

    Returns:
        One number for each seed with the whole grid.
    """
    found = records.find(question="range", task=task, method=method)
    values = []
    for seed in complete(records, task, method):
        losses = [loss(result) for spec, result in found.items() if spec.seed == seed and spec.multiple in GRID]
        values.append(statistics.fmean(losses) - min(losses))
    return Spread(tuple(values))


def best_rate(records: Records, task: str) -> float:
    """The best rate of the unguarded run.

    Args:
        records: all results.
        task: its name.

    Returns:
        A multiple of the task's rate.
    """
    found = records.find(question="range", task=task, method="nothing")
    means = {
        m: Spread(tuple(loss(r) for s, r in found.items() if s.multiple == m)).mean for m in {s.multiple for s in found}
    }
    return min(means, key=lambda multiple: means[multiple])


def quality(records: Records, task: str, method: str) -> Spread:
    """What a method costs where none is needed: final loss minus the unguarded run's, at the best rate of that one.

    Args:
        records: all results.
        task: its name.
        method: its name.

    Returns:
        One difference a seed, in nats; negative is better than unguarded.
    """
    rate = best_rate(records, task)
    plain = {s.seed: r for s, r in records.find(question="range", task=task, method="nothing", multiple=rate).items()}
    other = {s.seed: r for s, r in records.find(question="range", task=task, method=method, multiple=rate).items()}
    return Spread(tuple(loss(other[seed]) - loss(plain[seed]) for seed in other.keys() & plain.keys()))


def score(records: Records, method: str, names: list[str]) -> float:
    """One number for a method: the geometric mean over tasks of its range against the unguarded range, on its seeds.

    Ranges are those of the grid: what lies beyond counts as its end.

    Args:
        records: all results.
        method: its name.
        names: the tasks.

    Returns:
        A factor; a method that does not learn at the task's own rate counts as a quarter of that rate there.
    """
    ratios = []
    for task in names:
        seeds = complete(records, task, method)
        mine, plain = largest(records, task, method), largest(records, task, "nothing", seeds)
        mine, plain = min(mine, GRID[-1]), min(plain, GRID[-1])  # not every method was asked for more
        if mine == mine and plain == plain:
            ratios.append((mine or 0.25) / (plain or 0.25))
    return statistics.geometric_mean(ratios) if ratios else float("nan")
