# SPDX-License-Identifier: Apache-2.0
"""Results on disk: JSON lines, appended as they come, so that a suite can be stopped and taken up again."""

import json
import platform
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

import pss_param as pss
from suite.spec import Spec


def origin() -> dict[str, object]:
    """Where a figure comes from.

    Returns:
        Versions, commit, device, threads.
    """
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    return {
        "pss_param": pss.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"cpu ({platform.machine()}), 1 thread a run",
    }


class Store:
    """The file of results.

    Args:
        path: a file of JSON lines, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        """See the class."""
        self.path = path

    def records(self) -> Iterator[dict[str, object]]:
        """Read what is there; a line that a kill cut short is left out.

        Yields:
            dict: one record: "spec", "result", "origin".
        """
        if not self.path.exists():
            return
        for line in self.path.read_text().splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue  # measured again, because its key is missing

    def missing(self, specs: Iterable[Spec]) -> list[Spec]:
        """Find out what is still to be done.

        Args:
            specs: what is wanted.

        Returns:
            Those without a record, each once, in the order given.
        """
        there = {json.dumps(record["spec"], sort_keys=True) for record in self.records()}
        return [spec for spec in dict.fromkeys(specs) if spec.key not in there]

    def add(self, results: Iterable[tuple[Spec, dict[str, object]]], where: dict[str, object]) -> None:
        """Append records, one write for each.

        Args:
            results: what was measured.
            where: see :func:`origin`.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        broken = self.path.exists() and self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a") as file:
            if broken:
                file.write("\n")
            for spec, result in results:
                file.write(json.dumps({"spec": asdict(spec), "result": result, "origin": where}) + "\n")

    def drop(self, method: str) -> int:
        """Forget the records of one method, to measure it again.

        Args:
            method: its name.

        Returns:
            How many there were.
        """
        kept = [record for record in self.records() if record["spec"]["method"] != method]
        dropped = sum(1 for _ in self.records()) - len(kept)
        beside = self.path.with_suffix(".tmp")
        beside.write_text("".join(json.dumps(record) + "\n" for record in kept))
        beside.replace(self.path)
        return dropped
