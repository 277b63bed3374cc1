# SPDX-License-Identifier: Apache-2.0
"""Question 4, what reviewers would ask: one part of the published method, or of the default, changed at a time.

Every cell is a final training loss, capped at that of the best constant prediction: what a run that blew up is worth.
"""

import statistics
from dataclasses import dataclass

from suite.records import Records, Spread, loss

NOTICEABLE = 0.05
"""Nats: smaller differences of means are called level."""


@dataclass(frozen=True)
class Group:
    """What is varied.

    Args:
        base: the method of which one part is changed.
        methods: those that change it.
    """

    base: str
    methods: tuple[str, ...]


def _published(*methods: str) -> Group:
    return Group("pss-published", methods)


def _default(*methods: str) -> Group:
    return Group("pss-default", tuple(f"default-{method}" for method in methods))


GROUPS = {
    "threshold of the detector": _published(*(f"pss-threshold-{value:g}" for value in (1.5, 2, 3, 5, 10))),
    "decay of its average": _published("pss-decay-0.9", "pss-decay-0.99"),
    "weights that are smoothed": _published("pss-qk", "pss-attention", "pss-mlp"),
    "shape": _published("pss-softplus", "pss-log", "pss-softmax", "pss-convolution"),
    "edge": _published("pss-bulk", "pss-init"),
    "edge and damping under the default detector": _published(
        "pss-default", "pss-undamped", "pss-dominant", "pss-dominant-undamped", "pss-mild"
    ),
    "simpler rules in place of smoothing": _published("pss-second", "pss-rank-4", "pss-equal", "pss-noise", "halve-lr"),
    "what fires": _published("pss-default", "pss-floor", "pss-always", "pss-always-init", "pss-periodic", "pss-random"),
    "weights, of the default": _default("qk", "attention", "mlp", "all"),
    "shape, of the default": _default("log", "softplus"),
    "detector, of the default": _default("floor-alone", "threshold-1.5", "threshold-5"),
    "watch over the weights, of the default": _default(
        *("fraction-0.5", "fraction-0.8", "period-5", "period-100", "decay-0.9", "decay-0.999"),
        *("alert-0", "alert-20", "alert-100", "growth-1.5", "growth-4", "leap-0.02", "leap-0.15"),
    ),
    "policy, of the default": _default(
        *("damping-1", "damping-2", "damping-alone", "pace-0.001", "pace-0.01"),
        *("forgetting-0.95", "forgetting-0.998", "companions-left", "no-room"),
        *("cooldown-20", "smooth-and-clip", "smooth-and-skip", "reset-moments"),
    ),
}
"""What is varied; every table has the base and the unguarded run too."""


def cells(records: Records, method: str, columns: list[tuple[str, float]]) -> list[Spread]:
    """Losses of one method.

    Args:
        records: all results.
        method: its name.
        columns: tasks and multiples of their rates.

    Returns:
        One spread over the seeds for each column.
    """
    found = [records.find(question="range", method=method, task=task, multiple=m) for task, m in columns]
    return [Spread(tuple(loss(result) for result in results.values())) for results in found]


def measured(records: Records, methods: tuple[str, ...], tasks: tuple[str, ...]) -> list[tuple[str, float]]:
    """The columns in which all of the methods that were measured at all have a result.

    Args:
        records: all results.
        methods: their names.
        tasks: names of the tasks.

    Returns:
        Tasks and multiples, in order.
    """
    there = [method for method in methods if records.find(question="range", method=method)]
    common: list[tuple[str, float]] = []
    for task in tasks:
        for multiple in sorted(records.values("multiple", question="range", task=task)):
            specs = [records.find(question="range", method=m, task=task, multiple=multiple) for m in there]
            if specs and all(specs):
                common.append((task, multiple))
    return common


def group(records: Records, name: str, tasks: tuple[str, ...]) -> tuple[str, list[str], list[list[str]]]:
    """One question.

    Args:
        records: all results.
        name: one of :data:`GROUPS`.
        tasks: names of the tasks.

    Returns:
        What it says, the head of a table and its rows; no rows where nothing was measured.
    """
    base = GROUPS[name].base
    methods = ("nothing", base, *GROUPS[name].methods)
    columns = measured(records, methods, tasks)
    rows = {m: cells(records, m, columns) for m in methods if records.find(question="range", method=m)}
    means = {m: statistics.fmean(cell.mean for cell in found) for m, found in rows.items() if found}
    if len(means) < 3:
        return "", [], []
    head = ["method", "mean", *(f"{task} {multiple:g}x" for task, multiple in columns)]
    lines = [[m, f"{means[m]:.2f}", *map(str, found)] for m, found in rows.items()]
    own = [i for i, (_, multiple) in enumerate(columns) if multiple == 1.0]
    costs = {m: statistics.fmean(rows[m][i].mean for i in own) for m in rows} if own else {}
    return " ".join([_in_the_mean(means, base), _at_the_own_rate(costs)]).strip(), head, lines


def _in_the_mean(means: dict[str, float], base: str) -> str:
    others = {m: mean - means[base] for m, mean in means.items() if m not in {"nothing", base}}
    kinds = {
        "lower": [m for m, gap in others.items() if gap <= -NOTICEABLE],
        "level": [m for m, gap in others.items() if abs(gap) < NOTICEABLE],
        "higher": [m for m, gap in others.items() if gap >= NOTICEABLE],
    }
    told = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
    return f"Mean loss against {base} ({means[base]:.2f} nats), by {NOTICEABLE:g} nats or more: {told}."


def _at_the_own_rate(costs: dict[str, float]) -> str:
    dear = [m for m, cost in costs.items() if cost - costs["nothing"] >= NOTICEABLE]
    return f"Worse than unguarded at the networks' own rates: {', '.join(dear) or 'none'}." if costs else ""
