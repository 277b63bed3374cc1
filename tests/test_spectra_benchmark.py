# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the decomposition runs, and the README's table is made from its numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "examples" / "benchmarks"
README = BENCHMARKS.parent.parent / "README.md"
RESULTS = BENCHMARKS / "results" / "spectra.json"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the examples are in the repository only")


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from decomposition import report

    return report


def test_the_readme_has_the_table_of_the_results(report):
    if not RESULTS.exists():
        pytest.skip("no results yet")
    text = README.read_text(encoding="utf-8")
    shown = text.split(report.BEGIN, 1)[1].split(report.END, 1)[0].strip()
    gpu = json.loads(RESULTS.with_name("spectra-gpu.json").read_text(encoding="utf-8"))
    assert shown == report.table(json.loads(RESULTS.read_text(encoding="utf-8")), gpu)


def test_a_small_grid_is_measured_and_taken_up_again(tmp_path, report):
    out = tmp_path / "spectra.json"
    command = [
        sys.executable,
        str(BENCHMARKS / "spectra.py"),
        "--shapes",
        "96x64",
        "--repeats",
        "1",
        "--json",
        str(out),
    ]
    subprocess.run([*command, "--targets", "1e-2", "--spectra", "power 1"], check=True, capture_output=True)
    first = json.loads(out.read_text())["cells"]
    subprocess.run([*command, "--targets", "1e-2,1e-3", "--spectra", "power 1"], check=True, capture_output=True)
    cells = json.loads(out.read_text())["cells"]
    assert cells[0] == first[0]
    assert [cell["target"] for cell in cells] == [1e-2, 1e-3]
    for cell in cells:
        assert cell["error"] <= cell["bound"] <= cell["target"]
        assert cell["ratios"]["svd_lowrank"] > 0
        assert cell["at_our_error"]["ratio"] > 0
    table = report.table({"versions": "here", "cells": cells})
    assert "| `S ~ 1/j` | 2 |" in table
    assert "| **all** | 2 |" in table
