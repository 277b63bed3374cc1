# SPDX-License-Identifier: Apache-2.0
"""Results in memory: looked up by what was measured."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from suite.spec import Spec
from suite.training import DEAD

Result = dict[str, Any]


class Records:
    """All results, the last one of each measurement.

    Args:
        records: from :meth:`suite.store.Store.records`.
    """

    def __init__(self, records: Iterable[dict[str, Any]]) -> None:
        """See the class."""
        self.origins: dict[Spec, dict[str, Any]] = {}
        self._results: dict[Spec, Result] = {}
        self._by_task: dict[tuple[str, str], dict[Spec, Result]] = {}
        for record in records:
            spec = Spec(**record["spec"])
            self._results[spec] = self._by_task.setdefault((spec.question, spec.task), {})[spec] = record["result"]
            self.origins[spec] = record["origin"]

    def __len__(self) -> int:
        """Count the measurements."""
        return len(self._results)

    def find(self, **fields: Any) -> dict[Spec, Result]:
        """Choose by the fields of the specification.

        Args:
            fields: name and value.

        Returns:
            What has these values.
        """
        searched = self._results
        if {"question", "task"} <= set(fields):  # most do ask for both, and there are thousands
            searched = self._by_task.get((fields["question"], fields["task"]), {})
        return {
            spec: result
            for spec, result in searched.items()
            if all(getattr(spec, name) == value for name, value in fields.items())
        }

    def first(self, **fields: Any) -> Result | None:
        """One measurement.

        Args:
            fields: enough of them to name it.

        Returns:
            Its result, if there is one.
        """
        return next(iter(self.find(**fields).values()), None)

    def values(self, field: str, **fields: Any) -> list[Any]:
        """Which values a field takes.

        Args:
            field: name of a field of the specification.
            fields: see :meth:`find`.

        Returns:
            Each once, in the order of the file.
        """
        return list(dict.fromkeys(getattr(spec, field) for spec in self.find(**fields)))


@dataclass(frozen=True)
class Spread:
    """Several seeds in one cell.

    Args:
        values: one number a seed.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean.

        Returns:
            NaN where there is nothing.
        """
        return statistics.fmean(self.values) if self.values else float("nan")

    @property
    def deviation(self) -> float:
        """Sample standard deviation.

        Returns:
            0 for one value.
        """
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        """Mean and spread, as a table shows them."""
        if not self.values:
            return "-"
        return f"{self.mean:.2f} ± {self.deviation:.2f}" if len(self.values) > 1 else f"{self.mean:.2f}"


def loss(result: Result) -> float:
    """Final loss for comparisons: a run that blew up counts as the best constant prediction.

    Args:
        result: of one run.

    Returns:
        Nats.
    """
    final = result["final"]
    return result["trivial"] if final is None else min(final, result["trivial"])


def learns(result: Result) -> bool:
    """Whether a run learns, by the suite's one definition.

    Args:
        result: of one run.

    Returns:
        The verdict.
    """
    return result["final"] is not None and result["final"] < DEAD * result["trivial"]
