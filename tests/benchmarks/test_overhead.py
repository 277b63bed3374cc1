# SPDX-License-Identifier: Apache-2.0
"""The benchmark of what a guard costs: it runs, and the README shows what it has written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "examples" / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the examples are in the repository only", allow_module_level=True)
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))

import overhead  # noqa: E402
import overhead_table  # noqa: E402

STORED = json.loads(overhead.RESULTS.read_text(encoding="utf-8"))


def test_the_readme_shows_the_stored_figures(tmp_path):
    copy = tmp_path / "README.md"
    shutil.copy(overhead.README, copy)
    overhead_table.put(copy, STORED, overhead.stored_gpu())
    assert copy.read_text(encoding="utf-8") == overhead.README.read_text(encoding="utf-8"), (
        "run python examples/benchmarks/overhead.py --report"
    )


def test_the_command_that_writes_the_table_measures_nothing():
    before = overhead.README.read_bytes(), overhead.RESULTS.read_bytes()
    subprocess.run([sys.executable, str(BENCHMARKS / "overhead.py"), "--report"], check=True)
    assert (overhead.README.read_bytes(), overhead.RESULTS.read_bytes()) == before


def test_every_size_and_mode_was_measured():
    measured = {(line["size"], line["mode"]) for line in STORED["lines"]}
    assert {(size, mode) for size in ("small", "medium", "large") for mode in ("eager", "compiled")} <= measured
    assert STORED["run"]["steps"] >= 300


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(overhead.SIZES, "tiny", overhead.Size(16, 1, 2, 8, 2, 32))


def test_memory_is_that_of_open_views_and_damping():
    found = overhead.memory("tiny", "cpu")
    assert set(found) == set(STORED["memory"][0])
    assert found["plain"] <= found["quiet"] < found["triggered"]
    assert found["triggered"] - found["plain"] < 3 * found["guarded_weights"]


@pytest.mark.parametrize("mode", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_a_line_has_all_figures(mode):
    run = overhead.observe("tiny", "cpu", steps=12)
    assert 0 < run["guard_seconds"]
    assert run["rate"] == run["triggers"] / 12
    line = overhead.measure("tiny", "cpu", mode, rounds=2, run=run, alarmed=run)
    assert set(line) == set(STORED["lines"][0])
    assert line["weights"] == 4
    assert line["total_share_observed"] > line["quiet_guard_share"] > 0


def test_looks_are_those_of_the_detector():
    none, one = overhead.looks_of_a_run(0), overhead.looks_of_a_run(1)
    assert one > overhead.looks_of_a_run(1, own=False) > none > overhead.WHOLE_RUN / 25
    assert one < none + 60


def test_false_alarms_come_at_the_published_rate():
    run = overhead.observe("tiny", "cpu", 401, overhead.alarming())
    assert run["triggers"] == 1
    assert 0 <= run["held_share"] <= 1
