# SPDX-License-Identifier: Apache-2.0
"""What a repair judges a checkpoint by, before and after its death; nothing is trained on."""

from collections.abc import Iterator

import pss_param as pss
from pss_param.plan import StateDictSource
from pss_param.strength import measure_growth
from suite import rescues
from suite.deaths import Dead
from suite.records import Records, Result
from suite.spec import Spec

HEALTHY, KILLED = "healthy", "dead"
ON_THE_WAY = (5, 10, 20)
"""Steps at the deadly rate of deaths that are looked at on the way."""


def state(spec: Spec, past: Dead) -> dict[str, object]:
    """Look at a checkpoint as a repair without options does.

    Args:
        spec: the measurement; its method says which of the two checkpoints.
        past: what the dead run left.

    Returns:
        Median growth and stable rank of the matrices inside the blocks, both over a fresh one's, and the strength.
    """
    weights = (past.healthy if spec.method == HEALTHY else past.last).model
    found = measure_growth(StateDictSource(weights), pss.RepairOptions(device="cpu"))
    return {"growth": round(found.times, 3), "flatness": round(found.flatness, 3), "strength": found.strength}


def checkpoints(records: Records, task: str) -> Iterator[tuple[str, list[Result]]]:
    """The checkpoints of one task that were looked at, of deaths those alone that are real.

    Args:
        records: all results.
        task: its name.

    Yields:
        tuple[str, list[Result]]: what they are, and what was seen.
    """
    yield "healthy", list(records.find(question="state", task=task, method=HEALTHY).values())
    for death in ("late", "early"):
        real = {(spec.seed, spec.dying) for spec in rescues.dead_checkpoints(records, death, (0,), task)}
        seen = records.find(question="state", task=task, method=KILLED, death=death, dying=0)
        yield f"{death} death", [result for spec, result in seen.items() if (spec.seed, spec.dying) in real]
    for steps in ON_THE_WAY:
        found = records.find(question="state", task=task, method=KILLED, dying=steps)
        yield f"{steps} steps at the deadly rate", list(found.values())
