# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown from the results, good or bad."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from suite import ablations, rescues, sentences
from suite.plans import ABLATION_TASKS
from suite.plots import draw
from suite.ranges import largest, quality, score, sensitivity
from suite.records import Records, learns
from suite.store import Store

Row = list[str]

COUNTED = ("dead", "learn again", "ahead of the restart", "loss - restart", "steps saved")
"""Columns of one remedy on one task."""


def table(head: Row, rows: Iterable[Row]) -> str:
    """Lay out a Markdown table.

    Args:
        head: names of the columns.
        rows: cells.

    Returns:
        Its lines.
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def range_table(records: Records) -> str:
    """Question 1 in one table.

    Args:
        records: all results.

    Returns:
        Markdown.
    """
    names = records.values("task", question="range")
    methods = records.values("method", question="range")
    methods.sort(key=lambda method: -_or_zero(score(records, method, names)))
    rows = [
        [method, f"{score(records, method, names):.2f}", *(_times(largest(records, task, method)) for task in names)]
        for method in methods
    ]
    return table(["method", "range against unguarded", *names], rows)


def spread_table(records: Records, measure: object) -> str:
    """A number with its spread, for every method and task.

    Args:
        records: all results.
        measure: function of records, task and method.

    Returns:
        Markdown.
    """
    names = records.values("task", question="range")
    rows = [
        [method, *(str(measure(records, task, method)) for task in names)]
        for method in records.values("method", question="range")
    ]
    return table(["method", *names], rows)


def events_table(records: Records) -> str:
    """How often each method intervenes, and what it costs.

    Args:
        records: all results.

    Returns:
        Markdown.
    """
    rows = []
    plain = {(s.task, s.seed, s.multiple): r for s, r in records.find(question="range", method="nothing").items()}
    for method in records.values("method", question="range"):
        found = records.find(question="range", method=method)
        pairs = [
            (r, plain[s.task, s.seed, s.multiple]) for s, r in found.items() if (s.task, s.seed, s.multiple) in plain
        ]
        # A run that blew up early has fewer steps, so time is compared a step.
        seconds = [_pace(mine) / _pace(other) for mine, other in pairs]
        share = sum(r["events"] for r in found.values()) / sum(r["steps"] for r in found.values())
        ratio = statistics.median(seconds) if seconds else float("nan")
        rows.append([method, str(len(found)), f"{100 * share:.2f} %", f"{ratio:.2f}"])
    return table(["method", "runs", "steps with an intervention", "time of a step, median ratio"], rows)


def rescue_table(records: Records, death: str) -> str:
    """Question 2 in one table.

    Args:
        records: all results.
        death: "early" or "late".

    Returns:
        Markdown.
    """
    deaths = rescues.dead_checkpoints(records, death)
    rows = []
    for method in records.values("method", question="rescue"):
        t = rescues.tally(records, deaths, method)
        if t.count:
            alive, ahead = (f"{100 * n / t.count:.0f} %" for n in (t.alive, t.ahead))
            rows.append([method, str(t.count), alive, ahead, f"{t.gap:+.2f}", f"{t.behind:+.2f}", f"{t.saved:+.0f}"])
    head = [
        "remedy",
        "dead checkpoints",
        "learn again",
        "ahead of the restart",
        "loss - restart",
        "loss - never diverged",
    ]
    return table([*head, "steps saved"], rows)


def task_table(records: Records, death: str, method: str) -> str:
    """One remedy, task by task.

    Args:
        records: all results.
        death: "early" or "late".
        method: the remedy.

    Returns:
        Markdown.
    """
    rows = []
    for task in records.values("task", question="rescue"):
        made = records.find(question="rescue", task=task, death=death, method="continue")
        count = sum(spec.dying in rescues.USUAL for spec in made)
        t = rescues.tally(records, rescues.dead_checkpoints(records, death, task=task), method)
        rows.append([task, str(count), *_counted(t)])
    return table(["task", "checkpoints", *COUNTED], rows)


def healthy_table(records: Records) -> str:
    """What a repair does to healthy checkpoints.

    Args:
        records: all results.

    Returns:
        Markdown.
    """
    rows = []
    for task in records.values("task", question="healthy"):
        for method in records.values("method", question="healthy", task=task):
            found = records.find(question="healthy", task=task, method=method).values()
            begin, end = ([r[name] for r in found if r[name] is not None] for name in ("held_out_at_start", "final"))
            rows.append([task, method, _mean(begin), _mean(end)])
    return table(["task", "remedy", "held-out loss at once", "training loss after going on"], rows)


def recovery_table(records: Records) -> str:
    """How late a rescue still works.

    Args:
        records: all results.

    Returns:
        Markdown.
    """
    rows = []
    for task in records.values("task", question="rescue"):
        for dying in sorted(n for n in records.values("dying", question="rescue", task=task) if n):
            t = rescues.tally(records, rescues.dead_checkpoints(records, "late", (dying,), task), "repair")
            if t.count:
                rows.append([task, str(dying), *_counted(t)])
    return table(["task", "steps at the deadly rate", *COUNTED], rows)


def lead_table(records: Records) -> str:
    """How long before the death of the unguarded run the guard fires.

    Args:
        records: all results.

    Returns:
        Markdown.
    """
    rows = []
    for method in ("pss-default", "pss-published", "pss-floor"):
        leads, blind = [], 0
        for spec, plain in records.find(question="range", method="nothing").items():
            mine = records.first(**vars(replace(spec, method=method)))
            if mine is None or learns(plain) or plain["death"] is None:
                continue
            if mine["first_event"] is None:
                blind += 1
            else:
                leads.append(plain["death"] - mine["first_event"])
        if leads or blind:
            rows.append([method, str(len(leads) + blind), str(blind), _median(leads)])
    return table(["detector", "runs that die unguarded", "never fires", "median lead in steps"], rows)


def _counted(t: rescues.Tally) -> Row:
    if not t.count:
        return ["0", *["-"] * 4]
    return [str(t.count), str(t.alive), str(t.ahead), f"{t.gap:+.2f}", f"{t.saved:+.0f}"]


def _pace(result: dict[str, float]) -> float:
    return max(result["seconds"], 1e-3) / max(result["steps"], 1)


def _times(value: float) -> str:
    return "-" if value != value else f"{value:g}x" if value else "none"


def _or_zero(value: float) -> float:
    return value if value == value else 0.0


def _mean(values: list[float]) -> str:
    return f"{statistics.fmean(values):.2f}" if values else "-"


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):+.0f}" if values else "-"


def sections(records: Records) -> dict[str, str]:
    """The whole report.

    Args:
        records: all results.

    Returns:
        Markdown by heading, in order.
    """
    found = {
        "Learning rates that learn (largest multiple of the task's rate)": range_table(records),
        "Learning-rate sensitivity (nats, mean ± deviation over seeds; smaller is better)": spread_table(
            records, sensitivity
        ),
        "Loss against the unguarded run at its best rate (nats; negative is better)": spread_table(records, quality),
        "Interventions and time": events_table(records),
        "Lead": lead_table(records),
        "Rescue of late deaths": rescue_table(records, "late"),
        "Rescue of late deaths, by task: repair": task_table(records, "late", "repair"),
        "Rescue of late deaths, by task: roll back 100 steps": task_table(records, "late", "back-100"),
        "Rescue of early deaths, at the rate that killed": rescue_table(records, "early"),
        "Rescue of early deaths, by task: repair with the guard": task_table(records, "early", "repair-guard"),
        "Repair of healthy checkpoints": healthy_table(records),
        "How late a repair still works": recovery_table(records),
    }
    told = sentences.tell(records)
    return {head: f"{told[head]}\n\n{text}" if told.get(head) else text for head, text in found.items()}


def ablation_sections(records: Records) -> dict[str, str]:
    """One part of the published method changed at a time.

    Args:
        records: all results.

    Returns:
        Markdown by heading, in order.
    """
    found = {name: ablations.group(records, name, ABLATION_TASKS) for name in ablations.GROUPS}
    return {f"Ablation: {name}": f"{told}\n\n{table(head, rows)}" for name, (told, head, rows) in found.items() if rows}


def markdown(records: Records) -> str:
    """The report as one text.

    Args:
        records: all results.

    Returns:
        Markdown.
    """
    parts = [
        "# Stability: what was measured\n",
        f"{len(records)} runs. Made by `python examples/benchmarks/stability.py --report`.\n",
    ]
    parts += [f"- {json.dumps(origin)}" for origin in records.origins.values()]
    parts += [f"\n## {head}\n\n{text}" for head, text in {**sections(records), **ablation_sections(records)}.items()]
    return "\n".join(parts)


def write(store: Store, folder: Path) -> list[Path]:
    """Write tables and plots.

    Args:
        store: the results.
        folder: where to.

    Returns:
        The files.
    """
    records = Records(store.records())
    path = folder / "stability.md"
    path.write_text(markdown(records))
    return [path, *draw(records, folder)]
