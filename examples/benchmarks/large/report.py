# SPDX-License-Identifier: Apache-2.0
"""The README's section on GPT-2, from the JSON of the measurements and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BEGIN, END = "<!-- gpt2: begin -->", "<!-- gpt2: end -->"
Found = dict[str, Any]


def loss(row: Found) -> str:
    """A final loss, or that the run died."""
    return "dead" if row["dead"] else f"{row['final']:.2f}"


def by_rate(found: Found) -> list[str]:
    """Final loss of every method at every rate."""
    multiples = sorted({row["multiple"] for row in found["range"]})
    methods = list(dict.fromkeys(row["method"] for row in found["range"]))
    cells = {(row["method"], row["multiple"]): loss(row) for row in found["range"]}
    head = ["learning rate", *(f"{multiple * found['rate']:.2g}" for multiple in multiples)]
    rows = [[method, *(cells.get((method, multiple), "-") for multiple in multiples)] for method in methods]
    return [_line(head), _line(["---"] * len(head)), *map(_line, rows)]


def after_death(found: Found) -> list[str]:
    """Final loss of every way to go on, one column a death."""
    deaths = found["rescues"]
    names = list(dict.fromkeys(name for death in deaths.values() for name in death["ways"]))
    head = ["then", *(_title(kind, deaths[kind], found["rate"]) for kind in deaths)]
    rows = [
        [name, *(loss(death["ways"][name]) if name in death["ways"] else "-" for death in deaths.values())]
        for name in names
    ]
    return [_line(head), _line(["---"] * len(head)), *map(_line, rows)]


def section(found: Found) -> str:
    """What stands between the marks.

    Args:
        found: what ``gpt2.json`` holds.

    Returns:
        Markdown.
    """
    versions = found["versions"]
    repairs = [death["repair"]["seconds"] for death in found["rescues"].values() if death["ways"]]
    lines = [
        f"GPT-2, 124M parameters, {versions['device']}, torch {versions['torch']}, one seed; mean loss in nats of the "
        f"last 50 of {found['steps']} steps, token frequencies alone {found['trivial']:.2f}. Trained from scratch:",
        "",
        *by_rate(found),
    ]
    if repairs:
        lines += ["", "After a death, as many steps again:", "", *after_death(found), "", _repairs(repairs)]
    return "\n".join(lines)


def put(readme: Path, found: Found) -> None:
    """Write the section between the markers of a README."""
    text = readme.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN, 1)
    readme.write_text(f"{head}{BEGIN}\n{section(found)}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


def _repairs(seconds: list[float]) -> str:
    times = " and ".join(f"{each:.0f}" for each in seconds)
    return f"`pss-repair` took {times} s for the checkpoints with their optimizer states (1.5 GB each), start included."


def _title(kind: str, death: Found, rate: float) -> str:
    state = "dead" if death["dead"] else "not dead by the definition"
    return f"{kind}, at {death['deadly'] * rate:.2g}: {state}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
