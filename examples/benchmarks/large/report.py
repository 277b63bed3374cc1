# SPDX-License-Identifier: Apache-2.0
"""The README's section on GPT-2, from the JSON of the measurements and nothing else."""

from __future__ import annotations

from collections import defaultdict
from itertools import chain
from pathlib import Path
from statistics import mean, stdev
from typing import Any

BEGIN, END = "<!-- gpt2: begin -->", "<!-- gpt2: end -->"
NAMES = {"gpt2": "GPT-2, 124M parameters", "gpt2-small": "A GPT-2 of 4 layers and 128 columns"}
Found = dict[str, Any]


def losses(rows: list[Found], of: int) -> str:
    """Final losses of the seeds: mean and standard deviation of those that live, how many died or are missing."""
    dead, alive = sum(row["dead"] for row in rows), [row["final"] for row in rows if not row["dead"]]
    fewer = f" ({len(rows)} seed{'s' * (len(rows) > 1)})" if len(rows) < of else ""
    if not alive:
        return f"dead{fewer}" if dead else "-"
    spread = f" ± {stdev(alive):.2f}" if len(alive) > 1 else ""
    return f"{mean(alive):.2f}{spread}" + (f", {dead} of {len(rows)} dead" if dead else fewer)


def by_rate(seeds: list[Found]) -> list[str]:
    """Final losses of every method at every rate."""
    cells: dict[tuple[str, float], list[Found]] = defaultdict(list)
    for row in chain.from_iterable(found["range"] for found in seeds):
        cells[row["method"], row["multiple"]].append(row)
    multiples = sorted({multiple for _, multiple in cells})
    head = ["learning rate", *(f"{multiple * seeds[0]['rate']:.2g}" for multiple in multiples)]
    methods = dict.fromkeys(method for method, _ in cells)
    n = len(seeds)
    return _table(head, [[method, *(losses(cells[method, each], n) for each in multiples)] for method in methods])


def after_death(seeds: list[Found]) -> list[str]:
    """Final losses of every way to go on, one column a death."""
    deaths: dict[str, list[Found]] = defaultdict(list)
    for name, death in chain.from_iterable(found["rescues"].items() for found in seeds):
        if death["ways"]:
            deaths[name].append(death)
    ways = dict.fromkeys(way for death in chain(*deaths.values()) for way in death["ways"])
    head = ["then", *(_title(same, seeds[0]["rate"]) for same in deaths.values())]
    return _table(head, [[way, *(losses(_after(same, way), len(seeds)) for same in deaths.values())] for way in ways])


def section(seeds: list[Found]) -> str:
    """What stands between the marks.

    Args:
        seeds: what the files of the seeds hold.

    Returns:
        Markdown.
    """
    first, n = seeds[0], len(seeds)
    versions, trials = (
        first["versions"],
        "one seed" if n == 1 else f"{n} seeds, mean and standard deviation of those that live",
    )
    repairs = [death["repair"]["seconds"] for found in seeds for death in found["rescues"].values() if death["ways"]]
    lines = [
        f"{NAMES[first['size']]}, {versions['device']}, torch {versions['torch']}, {trials}; loss in nats over the "
        f"last 50 of {first['steps']} steps, token frequencies alone {first['trivial']:.2f}. Trained from scratch:",
        "",
        *by_rate(seeds),
    ]
    if repairs:
        lines += ["", "After a death, as many steps again:", "", *after_death(seeds)]
    if repairs and first["size"] == "gpt2":
        lines += ["", _repairs(repairs)]
    return "\n".join(lines)


def put(readme: Path, sizes: list[list[Found]]) -> None:
    """Write the section between the markers of a README."""
    head, rest = readme.read_text(encoding="utf-8").split(BEGIN, 1)
    text = "\n\n".join(map(section, sizes))
    readme.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


def _after(deaths: list[Found], way: str) -> list[Found]:
    return [death["ways"][way] for death in deaths if way in death["ways"]]


def _repairs(seconds: list[float]) -> str:
    return (
        f"`pss-repair` took {min(seconds):.0f} to {max(seconds):.0f} s for a checkpoint with its optimizer states "
        "(1.5 GB), start included, with trainings beside it."
    )


def _title(deaths: list[Found], rate: float) -> str:
    dead = sum(death["dead"] for death in deaths)
    state = "dead" if dead == len(deaths) else f"dead in {dead} of {len(deaths)}"
    return f"{deaths[0]['kind']}, at {deaths[0]['deadly'] * rate:.2g}: {state}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
