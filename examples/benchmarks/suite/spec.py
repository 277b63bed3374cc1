# SPDX-License-Identifier: Apache-2.0
"""What one measurement is: the whole of it in a few words, so that it can be done again or found in a file."""

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Spec:
    """One training run.

    Args:
        question: "range" (train from scratch), "rescue" (train on from a dead checkpoint), "healthy" (train on from a
            healthy one) or "state" (only look at a checkpoint).
        task: name in :func:`suite.task.tasks`.
        method: name in `suite.methods.METHODS` ("range") or `suite.remedies.REMEDIES` ("rescue" and "healthy"), or
            which checkpoint: "healthy" or "dead" ("state").
        seed: of the weights and of the data.
        multiple: learning rate as a multiple of the task's.
        death: "early", "late" or "" where nothing dies.
        dying: steps at the deadly rate; 0 for the task's own number.
    """

    question: str
    task: str
    method: str
    seed: int
    multiple: float = 1.0
    death: str = ""
    dying: int = 0

    @property
    def key(self) -> str:
        """The same in one line.

        Returns:
            Canonical JSON.
        """
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def checkpoint(self) -> tuple[str, str, int, int]:
        """What the run starts from.

        Returns:
            Task, death, seed, steps of dying.
        """
        return (self.task, self.death, self.seed, self.dying)
