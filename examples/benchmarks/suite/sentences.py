# SPDX-License-Identifier: Apache-2.0
"""What the tables say, in a sentence or two each, made from the same results."""

import statistics

from suite import rescues, states
from suite.ranges import best_rate, complete, largest, quality, score, sensitivity
from suite.records import Records, learns, loss

DEFAULT, REPAIR, GUARDED = "pss-default", "repair", "repair-guard"
FAR = 0.1
"""Nats behind the restart that a sentence speaks of."""

REACH = "Learning rates that learn (largest multiple of the task's rate)"
PRICE = "Learning-rate sensitivity (nats, mean ± deviation over seeds; smaller is better)"
QUALITY = "Loss against the unguarded run at its best rate (nats; negative is better)"
INTERVENTIONS = "Interventions at the networks' own rates"
TRIGGERS = "Interventions of the default guard at the networks' own rates"
LEAD = "Lead: steps from the first intervention to the death of the unguarded run"
LATE = "Rescue of late deaths"
DEADLY = "Rescue of late deaths at the rate that killed"
EARLY = "Rescue of early deaths, at the rate that killed"
HEALTHY = "Repair of healthy checkpoints"
STATES = "What a repair judges by: medians of the matrices inside the blocks"
RECOVERY = "How late a repair still works"
CHANGED = "Rescue of late deaths: a deep repair with one thing changed"


def tell(records: Records) -> dict[str, str]:
    """All sentences.

    Args:
        records: all results.

    Returns:
        By heading of :func:`suite.report.sections`; empty where nothing was measured.
    """
    return {
        REACH: reach(records),
        PRICE: price(records),
        QUALITY: costs(records),
        INTERVENTIONS: interventions(records),
        LEAD: "What acts at every rate has a long lead and tells nothing; the last column says how often it does.",
        LATE: rescue(records, "late"),
        DEADLY: deadly(records),
        EARLY: rescue(records, "early"),
        HEALTHY: healthy(records),
        STATES: judged(records),
        RECOVERY: recovery(records),
        CHANGED: changed(records),
    }


def reach(records: Records) -> str:
    """Whose range is the largest, and on how many networks ours is first or ten times the unguarded one.

    Args:
        records: all results.

    Returns:
        The sentence.
    """
    names, methods = _compared(records)
    if DEFAULT not in methods or "nothing" not in methods:
        return ""
    best = max(methods, key=lambda method: score(records, method, names))
    spans = {m: [largest(records, task, m) for task in names] for m in methods}
    widest = [max(column) for column in zip(*spans.values(), strict=True)]
    first = sum(ours == most for ours, most in zip(spans[DEFAULT], widest, strict=True))
    tenfold = sum(ours >= 10 * plain for ours, plain in zip(spans[DEFAULT], spans["nothing"], strict=True))
    factors = [ours / (plain or 0.25) for ours, plain in zip(spans[DEFAULT], spans["nothing"], strict=True)]
    beyond = statistics.geometric_mean([factor for factor in factors if factor] or [1.0])
    return (
        f"Of the methods that were measured on all {len(names)} networks, {best} has the largest range "
        f"({score(records, best, names):.2f} x the unguarded one within the grid, geometric mean). The default guard "
        f"has {score(records, DEFAULT, names):.2f} x within the grid and {beyond:.1f} x beyond it; it is first, alone "
        f"or with others, on {first} networks, and has ten times the unguarded range on {tenfold}."
    )


def price(records: Records) -> str:
    """Where the default is not the least sensitive to the learning rate.

    Args:
        records: all results.

    Returns:
        The sentence.
    """
    names, methods = _compared(records)
    if DEFAULT not in methods:
        return ""
    parts = []
    for task in names:
        means = {m: sensitivity(records, task, m).mean for m in methods}
        best = min(means, key=means.__getitem__)
        if best != DEFAULT:
            parts.append(f"on {task} {best} ({means[best]:.2f} against {means[DEFAULT]:.2f})")
    return f"The default guard has the least on {len(names) - len(parts)} networks; less: {'; '.join(parts) or 'none'}."


def costs(records: Records) -> str:
    """What the default costs at the unguarded run's best rate, and where that rate is.

    Args:
        records: all results.

    Returns:
        The sentence.
    """
    names = [task for task in records.values("task", question="range") if quality(records, task, DEFAULT).values]
    if not names:
        return ""
    found = {task: quality(records, task, DEFAULT).mean for task in names}
    worst = max(found, key=found.__getitem__)
    rates = ", ".join(f"{task} {best_rate(records, task):g}x" for task in names)
    return f"The default guard costs {found[worst]:+.2f} nats at most (on {worst}). Best rates unguarded: {rates}."


def interventions(records: Records) -> str:
    """How often the default acts where nothing is wrong.

    Args:
        records: all results.

    Returns:
        The sentence.
    """
    found = records.find(question="range", method=DEFAULT, multiple=1.0).values()
    shares = [100 * r["events"] / r["steps"] for r in found]
    if not shares:
        return ""
    return (
        f"The default guard acts in {statistics.fmean(shares):.1f} % of the steps in the mean of {len(shares)} runs, "
        f"{max(shares):.0f} % at most; of short runs from scratch, whose weights move fastest."
    )


def _compared(records: Records) -> tuple[list[str], list[str]]:
    """The tasks, and the methods with a whole grid on each of them."""
    names = records.values("task", question="range")
    methods = records.values("method", question="range")
    return names, [m for m in methods if all(complete(records, task, m) for task in names)]


def rescue(records: Records, death: str) -> str:
    """What the default repair did for the dead, beside the restart and the roll-back.

    Args:
        records: all results.
        death: "late" or "early".

    Returns:
        The sentences.
    """
    dead = rescues.dead_checkpoints(records, death)
    parts = []
    for remedy in (REPAIR, GUARDED, "restart", "restart-guard", "back-100"):
        t = rescues.tally(records, dead, remedy)
        if t.count:
            parts.append(
                f"{remedy}: {100 * t.alive / t.count:.0f} % of {t.count} learn again, {100 * t.ahead / t.count:.0f} % "
                f"ahead of the restart"
            )
    if not parts:
        return ""
    fair = rescues.tally(records, dead, GUARDED, "restart-guard")
    both = f" With the guard on in both, the repaired run ends below the restarted one in {fair.ahead} of {fair.count}"
    both += f", by {fair.gap.text()} nats in the median." if fair.count else ""
    return "; ".join(parts) + "." + (both if fair.count else "")


def deadly(records: Records) -> str:
    """Who lives at the rate that killed.

    Args:
        records: all results.

    Returns:
        The sentence.
    """
    dead = rescues.dead_checkpoints(records, "late", (0,))
    parts = []
    for remedy in ("repair-deadly", "repair-guard-deadly", "restart-deadly", "restart-guard-deadly"):
        t = rescues.tally(records, dead, remedy)
        if t.count:
            parts.append(f"{remedy} {t.alive} of {t.count}")
    return f"Learn: {', '.join(parts)}." if parts else ""


def changed(records: Records) -> str:
    """Which changes of a deep repair end lower on most checkpoints.

    Args:
        records: all results.

    Returns:
        The sentence.
    """
    dead = rescues.dead_checkpoints(records, "late", (0,))
    found = {m: rescues.tally(records, dead, m, "repair-deep") for m in records.values("method", question="rescue")}
    found = {m: t for m, t in found.items() if m.startswith("deep-") and t.count}
    better = [m for m, t in found.items() if 2 * t.ahead > t.count]
    return f"Lower than the deep repair as it is on most checkpoints: {', '.join(better) or 'none'}." if found else ""


def healthy(records: Records) -> str:
    """What the default repair took from checkpoints that needed none.

    Args:
        records: all results.

    Returns:
        The sentence.
    """
    plain = {(s.task, s.seed): r for s, r in records.find(question="healthy", method="continue").items()}
    losses = []
    for spec, result in records.find(question="healthy", method=REPAIR).items():
        other = plain.get((spec.task, spec.seed))
        if other and None not in (result["final"], other["final"]):
            losses.append(result["final"] - other["final"])
    if not losses:
        return ""
    losses.sort()
    return (
        f"Against going on without a repair, the default one cost {losses[len(losses) // 2]:+.2f} nats in the median "
        f"of {len(losses)} healthy checkpoints after as many steps again, {losses[-1]:+.2f} at worst."
    )


def judged(records: Records) -> str:
    """What growth tells healthy checkpoints from dead ones, and how often.

    Args:
        records: all results.

    Returns:
        The sentence.
    """
    seen: dict[str, list[dict[str, object]]] = {}
    for task in records.values("task", question="state"):
        for what, found in states.checkpoints(records, task):
            seen.setdefault(what.removeprefix("late ").removeprefix("early "), []).extend(found)
    whole, dead = seen.get("healthy", []), seen.get("death", [])
    if not whole or not dead:
        return ""
    spared, caught = (sum(r["strength"] == kind for r in some) for kind, some in (("gentle", whole), ("deep", dead)))
    return (
        f"A repair without options would be gentle with {spared} of {len(whole)} healthy checkpoints, and deep with "
        f"{caught} of {len(dead)} dead ones."
    )


def recovery(records: Records) -> str:
    """Whether there was a point of no return, and from when on a repair falls behind the restart.

    Args:
        records: all results.

    Returns:
        The sentences.
    """
    made = records.find(question="rescue", method=REPAIR, death="late")
    asked = tuple({spec.dying for spec in made} - {0})
    found = {spec: rescues.partner(records, spec, REPAIR) for spec in rescues.dead_checkpoints(records, "late", asked)}
    there = {spec: result for spec, result in found.items() if result}
    if not there:
        return ""
    lost = [spec for spec, result in there.items() if not learns(result)]
    longest = max(spec.dying for spec in there)
    told = f"{len(there) - len(lost)} of {len(there)} learn again, after up to {longest} steps at the deadly rate."
    behind = []
    for spec, result in there.items():
        restart = rescues.partner(records, spec, "restart")
        if restart and loss(result) - loss(restart) > FAR:
            behind.append(f"{spec.task} after {spec.dying} (seed {spec.seed}: {loss(result) - loss(restart):+.2f})")
    return f"{told} Behind the restart by more than {FAR:g} nats: {', '.join(behind) or 'none'}."
