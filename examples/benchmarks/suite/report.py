# SPDX-License-Identifier: Apache-2.0
"""The report: what was measured, in one Markdown file and a few plots."""

from collections import Counter
from pathlib import Path

from suite import ablations, sentences, tables
from suite.methods import METHODS
from suite.methods.guarded import FORMS
from suite.plans import ABLATION_TASKS, DEFAULT_TASKS
from suite.plots import draw
from suite.ranges import quality, sensitivity
from suite.records import Records
from suite.store import Store
from suite.training import DEAD, LAST

PREFACE = f"""\
# Stability: what was measured

Made by `python examples/benchmarks/stability.py --report` from `stability.jsonl`, one line a run.

- A run *dies* when a loss is not finite or the mean training loss of its last {LAST} steps is not below {DEAD} of that
  of the best constant prediction; it *learns* otherwise. A run that blew up counts as that prediction where losses are
  compared.
- Learning rates are multiples of each network's own. The first table goes on beyond 32x where a method still learnt
  there, until it did not; "≥" marks where it was not asked for more. Scores and sensitivities are those of the grid of
  0.5x to 32x, so that all methods are compared over the same rates.
- *Late* deaths: trained to health, killed by a higher rate, resumed at the healthy rate unless a heading says
  otherwise. *Early* deaths: killed from scratch after 150 steps, resumed at that rate.
- *Ahead of the restart*: a lower final loss than fresh weights trained for as many steps. *Steps saved*: what a run
  that met no deadly rate needs from scratch to get to the rescued run's final loss, minus the steps of the rescue.
- "±" is the standard deviation over seeds; medians have their quartiles in brackets.
- Runs are of some 250 to 640 steps, so there is no rolling back by 500 steps, and MSign acts every 10 steps (`msign`)
  beside its authors' 100 (`msign-100`).
"""


def sections(records: Records) -> dict[str, str]:
    """The whole report.

    Args:
        records: all results.

    Returns:
        Markdown by heading, in order.
    """
    found = {
        sentences.REACH: tables.range_table(records),
        sentences.PRICE: tables.spread_table(records, sensitivity),
        sentences.QUALITY: tables.spread_table(records, quality),
        sentences.INTERVENTIONS: tables.interventions_table(records),
        sentences.TRIGGERS: tables.triggers_table(records, "pss-default"),
        sentences.LEAD: tables.lead_table(records),
        sentences.LATE: tables.rescue_table(records, "late"),
        "Rescue of late deaths, by task: repair": tables.task_table(records, "late", "repair"),
        "Rescue of late deaths, by task: repair with the guard": tables.task_table(records, "late", "repair-guard"),
        "Rescue of late deaths, by task: roll back 100 steps": tables.task_table(records, "late", "back-100"),
        "Rescue of late deaths, one by one: final losses": tables.seeds_table(records, "late"),
        sentences.DEADLY: tables.deadly_table(records),
        sentences.EARLY: tables.rescue_table(records, "early"),
        "Rescue of early deaths, by task: repair with the guard": tables.task_table(records, "early", "repair-guard"),
        "Rescue of early deaths, one by one: final losses": tables.seeds_table(records, "early"),
        sentences.HEALTHY: tables.healthy_table(records),
        sentences.STATES: tables.states_table(records),
        sentences.RECOVERY: tables.recovery_table(records),
        sentences.CHANGED: tables.changed_table(records),
    }
    told = sentences.tell(records)
    return {head: f"{told[head]}\n\n{text}" if told.get(head) else text for head, text in found.items()}


def ablation_sections(records: Records) -> dict[str, str]:
    """One part of the published method, or of the default, changed at a time.

    Args:
        records: all results.

    Returns:
        Markdown by heading, in order.
    """
    found = {}
    for name, group in ablations.GROUPS.items():
        where = DEFAULT_TASKS if group.base == "pss-default" else ABLATION_TASKS
        told, head, rows = ablations.group(records, name, where)
        if rows:
            found[f"Ablation: {name}"] = f"{told}\n\n{tables.table(head, rows)}"
    return found


def methods_section() -> str:
    """What the names stand for.

    Returns:
        Markdown.
    """
    said = {name: (METHODS[name]().__doc__ or "").split("\n")[0] for name in METHODS if name not in FORMS}
    rows = [[f"`{name}`", text] for name, text in said.items()]
    forms = (
        "`pss-...` and `default-...`: see the comments in `suite/methods/guarded.py`; remedies: `suite/remedies.py`."
    )
    return f"{tables.table(['method', 'what it does'], rows)}\n{forms}\n"


def origins_section(records: Records) -> str:
    """Where the results come from.

    Args:
        records: all results.

    Returns:
        Markdown.
    """
    counts = Counter(tuple(str(value) for value in origin.values()) for origin in records.origins.values())
    head = list(next(iter(records.origins.values()))) if records.origins else []
    rows = [[*values, str(count)] for values, count in counts.items()]
    return tables.table([*head, "runs"], rows)


def markdown(records: Records) -> str:
    """The report as one text.

    Args:
        records: all results.

    Returns:
        Markdown.
    """
    body = {**sections(records), **ablation_sections(records)}
    body |= {"Methods": methods_section(), "Origins": origins_section(records)}
    return "\n".join([PREFACE, *(f"## {head}\n\n{text}" for head, text in body.items())])


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
