# SPDX-License-Identifier: Apache-2.0
"""Question 4, what reviewers would ask: one part of the published method changed at a time, on a few networks.

Every cell is a final training loss, capped at that of the best constant prediction: what a run that blew up is worth.
"""

import statistics

from suite.records import Records, Spread, loss

BASE = "pss-published"
GROUPS = {
    "threshold of the detector": tuple(f"pss-threshold-{value:g}" for value in (1.5, 2, 3, 5, 10)),
    "decay of its average": ("pss-decay-0.9", "pss-decay-0.99"),
    "weights that are smoothed": ("pss-qk", "pss-attention", "pss-mlp"),
    "shape": ("pss-softplus", "pss-log", "pss-softmax", "pss-convolution"),
    "edge": ("pss-bulk", "pss-init"),
    "edge and damping under the default detector": (
        "pss-default",
        "pss-undamped",
        "pss-dominant",
        "pss-dominant-undamped",
        "pss-mild",
    ),
    "simpler rules in place of smoothing": ("pss-second", "pss-rank-4", "pss-equal", "pss-noise", "halve-lr"),
    "what fires": (
        "pss-default",
        "pss-floor",
        "pss-always",
        "pss-always-init",
        "pss-periodic",
        "pss-random",
    ),
}
"""What is varied, with the methods that vary it; all beside :data:`BASE` and the unguarded run."""


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
        A sentence, the head of a table and its rows; no rows where nothing was measured.
    """
    methods = ("nothing", BASE, *GROUPS[name])
    columns = measured(records, methods, tasks)
    rows = {m: cells(records, m, columns) for m in methods if records.find(question="range", method=m)}
    means = {m: statistics.fmean(cell.mean for cell in found) for m, found in rows.items() if found}
    if len(means) < 3:
        return "", [], []
    head = ["method", "mean", *(f"{task} {multiple:g}x" for task, multiple in columns)]
    lines = [[m, f"{means[m]:.2f}", *map(str, found)] for m, found in rows.items()]
    best, worst = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    told = f"Least mean loss: {best} ({means[best]:.2f}); most: {worst} ({means[worst]:.2f})"
    return f"{told}; as published: {means.get(BASE, float('nan')):.2f}.", head, lines
