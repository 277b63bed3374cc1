# SPDX-License-Identifier: Apache-2.0
"""Plots of the results: loss over learning rate, and rescue against restart."""

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from suite import rescues
from suite.plans import ABLATION_TASKS, DYING
from suite.records import Records, Spread, loss

SHOWN = {
    "nothing": ("tab:gray", "o"),
    "clip-1.0": ("tab:olive", "v"),
    "warmup": ("tab:blue", "^"),
    "zclip": ("tab:cyan", "s"),
    "pss-published": ("tab:orange", "D"),
    "spectral-norm": ("tab:green", "P"),
    "pss-default": ("tab:red", "*"),
}


def curves(records: Records, path: Path) -> Path:
    """Final loss over the learning rate, one panel a task.

    Args:
        records: all results.
        path: file to write.

    Returns:
        The same.
    """
    names = records.values("task", question="range")
    rows = (len(names) + 4) // 5
    figure, axes = plt.subplots(
        rows, min(5, len(names)), figsize=(3.2 * min(5, len(names)), 2.7 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis, task in zip(axes.flat, names, strict=False):
        for method, (color, marker) in SHOWN.items():
            found = records.find(question="range", task=task, method=method)
            multiples = sorted({spec.multiple for spec in found})
            means = [Spread(tuple(loss(r) for s, r in found.items() if s.multiple == m)).mean for m in multiples]
            if not found:
                continue
            axis.plot(multiples, means, color=color, marker=marker, label=method, linewidth=1.2, markersize=4)
        trivial = next(iter(records.find(question="range", task=task).values()))["trivial"]
        axis.axhline(trivial, color="black", linewidth=0.6, linestyle=":")
        axis.set(xscale="log", title=task)
        axis.title.set_fontsize(9)
        axis.set_xticks([0.25, 1, 4, 16, 64, 256], ["¼", "1", "4", "16", "64", "256"])
        axis.minorticks_off()
    axes.flat[0].legend(fontsize=7)
    figure.supxlabel("learning rate, as a multiple of the task's own")
    figure.supylabel("final training loss (nats); dotted: constant prediction")
    return _save(figure, path)


def rescue(records: Records, path: Path) -> Path:
    """Each late death: the rescued run against the restart.

    Args:
        records: all results.
        path: file to write.

    Returns:
        The same.
    """
    figure, axis = plt.subplots(figsize=(5, 4.6), layout="constrained")
    for number, task in enumerate(records.values("task", question="rescue")):
        points = []
        for spec in rescues.dead_checkpoints(records, "late", task=task):
            mine, restart = (rescues.partner(records, spec, name) for name in ("repair", "restart"))
            if mine and restart:
                points.append((loss(restart) / restart["trivial"], loss(mine) / mine["trivial"]))
        if points:
            axis.scatter(*zip(*points, strict=True), color=f"C{number}", label=task, s=28)
    axis.plot([0, 1], [0, 1], color="black", linewidth=0.6)
    axis.set(xlabel="restart from scratch: loss / trivial loss", ylabel="repaired: loss / trivial loss")
    axis.set_title("late deaths: below the line, the repair is ahead", fontsize=10)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)
    return _save(figure, path)


def recovery(records: Records, path: Path) -> Path:
    """How late a repair still works: loss against the restart over the steps at the deadly rate.

    Args:
        records: all results.
        path: file to write.

    Returns:
        The same.
    """
    figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
    for number, task in enumerate(ABLATION_TASKS):
        points = {}
        for steps in DYING:
            dead = rescues.dead_checkpoints(records, "late", (steps,), task)
            gaps = rescues.tally(records, dead, "repair").gap.values
            points |= {steps: gaps} if gaps else {}
        if points:
            middle = [statistics.median(gaps) for gaps in points.values()]
            around = [(m - min(gaps), max(gaps) - m) for m, gaps in zip(middle, points.values(), strict=True)]
            error = [list(side) for side in zip(*around, strict=True)]
            axis.errorbar(list(points), middle, error, color=f"C{number}", marker="o", capsize=3, label=task)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set(xscale="log", xlabel="steps at the deadly rate", ylabel="repaired - restart (nats)")
    axis.set_xticks(DYING, [str(steps) for steps in DYING])
    axis.minorticks_off()
    axis.set_title("below the line, the repair is ahead; bars: all seeds", fontsize=10)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)
    return _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def draw(records: Records, folder: Path) -> list[Path]:
    """Draw what there is.

    Args:
        records: all results.
        folder: where to.

    Returns:
        The files.
    """
    files = []
    if records.find(question="range"):
        files.append(curves(records, folder / "stability-range.png"))
    if records.find(question="rescue"):
        files.append(rescue(records, folder / "stability-rescue.png"))
        files.append(recovery(records, folder / "stability-recovery.png"))
    return files
