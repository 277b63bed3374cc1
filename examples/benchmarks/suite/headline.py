# SPDX-License-Identifier: Apache-2.0
"""The few figures that the README shows, and the place where it shows them."""

from pathlib import Path

from suite import rescues
from suite.plans import HEADLINE
from suite.ranges import complete, score, sensitivity
from suite.records import Records, Spread
from suite.tables import share, table

BEGIN, END = "<!-- stability: begin -->", "<!-- stability: end -->"
REMEDIES = (
    "continue",
    "reset-rewarmup",
    "halve-lr",
    "repair",
    "repair-keep",
    "repair-guard",
    "repair-gentle",
    "repair-deep",
    "restart",
    "restart-guard",
    "back-100",
)


def live(records: Records) -> str:
    """Methods in training.

    Args:
        records: all results.

    Returns:
        Markdown.
    """
    rows = []
    names = records.values("task", question="range")
    for method in HEADLINE:
        seeds = min(len(complete(records, task, method)) for task in names)
        if seeds:  # a mean over some tasks only would be compared with one over all
            prices = [value for task in names for value in sensitivity(records, task, method).values]
            reached = f"{score(records, method, names):.2f}x"
            rows.append([method, str(len(names)), str(seeds), reached, f"{Spread(tuple(prices)).mean:.2f}"])
    head = ["in training", "tasks", "seeds", "range of learning rates against unguarded"]
    return table([*head, "learning-rate sensitivity (nats)"], rows)


def offline(records: Records) -> str:
    """Remedies for dead checkpoints.

    Args:
        records: all results.

    Returns:
        Markdown.
    """
    deaths = {death: rescues.dead_checkpoints(records, death) for death in ("late", "early")}
    rows = []
    for method in REMEDIES:
        late, early = (rescues.tally(records, found, method) for found in deaths.values())
        if late.count == len(deaths["late"]) and early.count == len(deaths["early"]):
            rows.append(
                [
                    method,
                    share(late.alive, late.count),
                    share(late.ahead, late.count),
                    f"{late.saved.middle:+.0f}",
                    share(early.alive, early.count),
                ]
            )
    head = ["dead checkpoints", *(f"{death} deaths: {len(found)}" for death, found in deaths.items())]
    late_columns = [f"{head[1]}, learn again", "ahead of a restart", "steps saved, median"]
    return table([head[0], *late_columns, f"{head[2]}, learn again"], rows)


def put(readme: Path, records: Records) -> None:
    """Write the figures between the README's two marks.

    Args:
        readme: the file.
        records: all results.
    """
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{section(records)}{END}{after}")


def section(records: Records) -> str:
    """What stands between the marks.

    Args:
        records: all results.

    Returns:
        Markdown.
    """
    parts = {"rescue": offline, "range": live}
    return "\n".join(part(records) for question, part in parts.items() if records.find(question=question))
