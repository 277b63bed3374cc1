# SPDX-License-Identifier: Apache-2.0
"""What the tables say, in a sentence each, made from the same results."""

from suite import rescues
from suite.ranges import largest, score
from suite.records import Records, learns

DEFAULT, REPAIR = "pss-default", "repair"


def tell(records: Records) -> dict[str, str]:
    """All sentences.

    Args:
        records: all results.

    Returns:
        By heading of :func:`suite.report.sections`; empty where nothing was measured.
    """
    return {
        "Learning rates that learn (largest multiple of the task's rate)": reach(records),
        "Rescue of late deaths": rescue(records, "late"),
        "Rescue of early deaths, at the rate that killed": rescue(records, "early"),
        "Repair of healthy checkpoints": healthy(records),
        "How late a repair still works": recovery(records),
    }


def reach(records: Records) -> str:
    """Whose range is the largest, and on how many networks ours is first or ten times the unguarded one.

    Args:
        records: all results.

    Returns:
        The sentence.
    """
    names = records.values("task", question="range")
    methods = [m for m in records.values("method", question="range") if _everywhere(records, m, names)]
    if DEFAULT not in methods or "nothing" not in methods:
        return ""
    best = max(methods, key=lambda method: score(records, method, names))
    spans = {m: [largest(records, task, m) for task in names] for m in methods}
    widest = [max(column) for column in zip(*spans.values(), strict=True)]
    first = sum(ours == most for ours, most in zip(spans[DEFAULT], widest, strict=True))
    tenfold = sum(ours >= 10 * plain for ours, plain in zip(spans[DEFAULT], spans["nothing"], strict=True))
    return (
        f"Of the methods that were measured on all {len(names)} networks, {best} has the largest range "
        f"({score(records, best, names):.2f} x the unguarded one, geometric mean). The default guard has "
        f"{score(records, DEFAULT, names):.2f} x; it is first, alone or with others, on {first} networks, and has ten "
        f"times the unguarded range on {tenfold}."
    )


def _everywhere(records: Records, method: str, names: list[str]) -> bool:
    return set(records.values("task", question="range", method=method)) == set(names)


def rescue(records: Records, death: str) -> str:
    """What the default repair did for the dead, beside the restart and the roll-back.

    Args:
        records: all results.
        death: "late" or "early".

    Returns:
        The sentence.
    """
    dead = rescues.dead_checkpoints(records, death)
    parts = []
    for remedy in (REPAIR, "repair-guard", "restart", "back-100"):
        t = rescues.tally(records, dead, remedy)
        if t.count:
            parts.append(
                f"{remedy}: {100 * t.alive / t.count:.0f} % of {t.count} learn again, {100 * t.ahead / t.count:.0f} % "
                f"ahead of the restart"
            )
    return "; ".join(parts) + "." if parts else ""


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


def recovery(records: Records) -> str:
    """Whether there was a point of no return.

    Args:
        records: all results.

    Returns:
        The sentence.
    """
    made = records.find(question="rescue", method=REPAIR, death="late")
    asked = tuple({spec.dying for spec in made} - {0})
    found = {spec: rescues.partner(records, spec, REPAIR) for spec in rescues.dead_checkpoints(records, "late", asked)}
    lost = sorted({spec.dying for spec, result in found.items() if result and not learns(result)})
    longest = max((spec.dying for spec, result in found.items() if result), default=0)
    if not longest:
        return ""
    if lost:
        return f"Some stayed dead after {', '.join(map(str, lost))} steps at the deadly rate."
    return f"Nothing stayed dead after up to {longest} steps at the deadly rate: no point of no return was found."
