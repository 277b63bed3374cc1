# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown from the results, good or bad."""

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from suite import rescues, states
from suite.ranges import largest, open_ended, score
from suite.records import Records, Spread, learns, loss
from suite.remedies import CHANGED, DEADLY, USUAL_REMEDIES
from suite.spec import Spec

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
        Markdown; methods that were asked for the whole grid, in the order of their scores.
    """
    names = records.values("task", question="range")
    scores = {method: score(records, method, names) for method in records.values("method", question="range")}
    ranked = sorted((m for m, value in scores.items() if value == value), key=lambda m: -scores[m])
    rows = [[m, f"{scores[m]:.2f}", *(_times(records, task, m) for task in names)] for m in ranked]
    return table(["method", "range against unguarded", *names], rows)


def spread_table(records: Records, measure: Callable[[Records, str, str], Spread]) -> str:
    """A number with its spread, for every method and task.

    Args:
        records: all results.
        measure: function of records, task and method.

    Returns:
        Markdown; methods without a number anywhere are left out.
    """
    names = records.values("task", question="range")
    spreads = {m: [measure(records, task, m) for task in names] for m in records.values("method", question="range")}
    rows = [[method, *map(str, found)] for method, found in spreads.items() if any(one.values for one in found)]
    return table(["method", *names], rows)


def interventions_table(records: Records) -> str:
    """How often each method intervenes where nothing is wrong: at the networks' own rates.

    Args:
        records: all results.

    Returns:
        Markdown.
    """
    rows = []
    for method in records.values("method", question="range"):
        shares = [
            r["events"] / r["steps"] for r in records.find(question="range", method=method, multiple=1.0).values()
        ]
        if any(shares):
            least, most = (f"{100 * edge(shares):.0f}" for edge in (min, max))
            rows.append([method, str(len(shares)), f"{100 * statistics.fmean(shares):.1f} %", f"{least} to {most} %"])
    return table(["method", "runs", "steps with an intervention, mean", "least to most of a run"], rows)


def triggers_table(records: Records, method: str) -> str:
    """What a guard does at the networks' own rates: triggers, and steps in which it only holds.

    Args:
        records: all results.
        method: a guard.

    Returns:
        Markdown.
    """
    rows = []
    for task in records.values("task", question="range"):
        found = records.find(question="range", task=task, method=method, multiple=1.0).values()
        if found and all("held" in r for r in found):
            fired = Spread(tuple(100 * (r["events"] - r["held"]) / r["steps"] for r in found))
            held = Spread(tuple(100 * r["held"] / r["steps"] for r in found))
            rows.append([task, str(len(found)), f"{fired} %", f"{held} %"])
    return table(["task", "runs", "steps with a trigger", "steps in which weights are held after one"], rows)


def rescue_table(records: Records, death: str) -> str:
    """Question 2 in one table.

    Args:
        records: all results.
        death: "early" or "late".

    Returns:
        Markdown.
    """
    deaths = rescues.dead_checkpoints(records, death)
    # Early deaths are younger than 200 steps.
    remedies = [m for m in USUAL_REMEDIES if not (death == "early" and m == "back-200")]
    rows = []
    for method, t in _tallied(records, deaths, remedies):
        guarded = rescues.tally(records, deaths, method, "restart-guard")
        shares = [share(t.alive, t.count), share(t.ahead, t.count), share(guarded.ahead, guarded.count)]
        rows.append([method, str(t.count), *shares, t.gap.text(), t.behind.text(), t.saved.text(0)])
    head = ["remedy", "dead checkpoints", "learn again", "ahead of the restart", "ahead of a restart with the guard"]
    return table([*head, "loss - restart", "loss - never diverged", "steps saved"], rows)


def deadly_table(records: Records) -> str:
    """Late deaths that go on at the rate that killed them.

    Args:
        records: all results.

    Returns:
        Markdown.
    """
    deaths = rescues.dead_checkpoints(records, "late", (0,))
    rows = [
        [m, str(t.count), share(t.alive, t.count), share(t.ahead, t.count), t.gap.text(), t.behind.text()]
        for m, t in _tallied(records, deaths, DEADLY, "restart-guard-deadly")
    ]
    other = "a restart with the guard, at that rate"
    head = ["at the rate that killed", "dead checkpoints", "learn again", f"ahead of {other}", f"loss - {other}"]
    return table([*head, "loss - never diverged"], rows)


def changed_table(records: Records) -> str:
    """A deep repair with one thing changed.

    Args:
        records: all results.

    Returns:
        Markdown.
    """
    deaths = rescues.dead_checkpoints(records, "late", (0,))
    rows = [
        [m, str(t.count), share(t.alive, t.count), f"{t.ahead} of {t.count}", t.gap.text()]
        for m, t in _tallied(records, deaths, CHANGED, "repair-deep")
    ]
    head = ["remedy", "dead checkpoints", "learn again", "ends lower than repair-deep", "loss - repair-deep"]
    return table(head, rows)


def seeds_table(records: Records, death: str) -> str:
    """Every dead checkpoint by itself.

    Args:
        records: all results.
        death: "early" or "late".

    Returns:
        Markdown.
    """
    shown = ("never", "restart", "restart-guard", "repair", "repair-guard", "back-100")
    rows = []
    order = records.values("task", question="range")
    deaths = rescues.dead_checkpoints(records, death)
    for spec in sorted(deaths, key=lambda spec: (order.index(spec.task), spec.seed, spec.dying)):
        found = [rescues.partner(records, spec, method) for method in shown]
        losses = ["-" if r is None else f"{loss(r):.2f}" for r in found]
        rows.append([spec.task, str(spec.seed), str(spec.dying or "usual"), *losses])
    return table(["task", "seed", "steps at the deadly rate", *shown], rows)


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
            numbers = ([r[name] for r in found if r[name] is not None] for name in ("held_out_at_start", "final"))
            rows.append([task, method, *(str(Spread(tuple(values))) for values in numbers)])
    return table(["task", "remedy", "held-out loss at once", "training loss after going on"], rows)


def states_table(records: Records) -> str:
    """What a repair without options judges by, and what it would be.

    Args:
        records: all results.

    Returns:
        Markdown.
    """
    rows = []
    for task in records.values("task", question="state"):
        for what, found in states.checkpoints(records, task):
            if found:
                spans = [_span([r[name] for r in found]) for name in ("growth", "flatness")]
                deep = sum(r["strength"] == "deep" for r in found)
                rows.append([task, what, str(len(found)), *spans, f"{deep} of {len(found)}"])
    head = [
        "task",
        "checkpoints",
        "number",
        "growth: spectral norm over a fresh one's",
        "stable rank over a fresh one's",
    ]
    return table([*head, "a repair is deep"], rows)


def _span(values: list[float]) -> str:
    least, most = f"{min(values):.2f}", f"{max(values):.2f}"
    return least if least == most else f"{least} to {most}"


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
        leads, blind, alarms = [], 0, []
        for spec, plain in records.find(question="range", method="nothing").items():
            mine = records.first(**vars(replace(spec, method=method)))
            if mine is None:
                continue
            first = mine["first_event"]
            if learns(plain):
                alarms.append(first is not None)
            elif plain["death"] is not None and first is not None:
                leads.append(plain["death"] - first)
            else:
                blind += plain["death"] is not None
        if leads or blind:
            dying = [str(len(leads) + blind), str(blind), rescues.Middle(tuple(leads)).text(0)]
            rows.append([method, *dying, str(len(alarms)), share(sum(alarms), len(alarms))])
    head = ["detector", "runs that die unguarded", "never fires", "lead in steps"]
    return table([*head, "runs that live unguarded", "fires there too"], rows)


def _counted(t: rescues.Tally) -> Row:
    if not t.count:
        return ["0", *["-"] * 4]
    return [str(t.count), str(t.alive), str(t.ahead), t.gap.text(), t.saved.text(0)]


def _times(records: Records, task: str, method: str) -> str:
    value = largest(records, task, method)
    if value != value:
        return "-"
    return f"{'≥ ' if open_ended(records, task, method) else ''}{value:g}x" if value else "none"


def _tallied(
    records: Records, deaths: list[Spec], remedies: Iterable[str], restart: str = "restart"
) -> Iterator[tuple[str, rescues.Tally]]:
    """The remedies that were measured on some of the checkpoints."""
    for remedy in remedies:
        found = rescues.tally(records, deaths, remedy, restart)
        if found.count:
            yield remedy, found


def share(part: int, whole: int) -> str:
    """A share as tables show it.

    Args:
        part: how many.
        whole: of how many.

    Returns:
        Percent, or a dash where there was nothing.
    """
    return f"{100 * part / whole:.0f} %" if whole else "-"
