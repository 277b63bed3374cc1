# SPDX-License-Identifier: Apache-2.0
"""The program of the large network: it runs small, can be taken up again, and the README shows what it has written."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "examples" / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the examples are in the repository only", allow_module_level=True)
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))

import gpt2  # noqa: E402
from large import report  # noqa: E402
from large.measuring import WAYS  # noqa: E402

STORED = json.loads(gpt2.RESULTS.read_text(encoding="utf-8"))


def test_the_readme_shows_the_stored_figures(tmp_path):
    copy = tmp_path / "README.md"
    shutil.copy(gpt2.README, copy)
    report.put(copy, STORED)
    assert copy.read_text(encoding="utf-8") == gpt2.README.read_text(encoding="utf-8"), (
        "run python examples/benchmarks/gpt2.py --report"
    )


def test_the_command_that_writes_the_table_measures_nothing():
    before = gpt2.README.read_bytes(), gpt2.RESULTS.read_bytes()
    CliRunner().invoke(gpt2.main, ["--report"], catch_exceptions=False)
    assert (gpt2.README.read_bytes(), gpt2.RESULTS.read_bytes()) == before


def test_what_died_and_what_was_not_measured_is_shown_as_such():
    row = {"method": "nothing", "multiple": 1.0, "final": 2.0, "dead": False}
    death = {
        "deadly": 64.0,
        "dead": True,
        "repair": {"seconds": 7.6},
        "ways": {"repair": row, "continue": row | {"dead": True}},
    }
    found = STORED | {
        "range": [row, row | {"method": "warmup", "multiple": 4.0, "dead": True}],
        "rescues": {"late": death},
    }
    text = report.section(found)
    assert "| nothing | 2.00 | - |" in text
    assert "| warmup | - | dead |" in text
    assert "| then | late, at 0.0096: dead |" in text
    assert "| continue | dead |" in text
    assert "took 8 s" in text


@pytest.mark.slow
def test_a_small_network_is_measured_and_taken_up_again(tmp_path, monkeypatch):
    from large import text

    some = text.modules()[:40]
    monkeypatch.setattr(text, "modules", lambda: some)
    out = tmp_path / "gpt2.json"
    command = ["--size", "tiny", "--device", "cpu", "--methods", "nothing,pss-default", "--early", "64", "--late", "64"]
    command += ["--json", str(out), "--multiples"]
    CliRunner().invoke(gpt2.main, [*command, "1"], catch_exceptions=False)
    first = json.loads(out.read_text(encoding="utf-8"))
    assert [row["method"] for row in first["range"]] == ["nothing", "pss-default"]
    assert set(first["rescues"]["late"]["ways"]) == set(WAYS)
    assert set(first["rescues"]["early"]["ways"]) == {name for name, way in WAYS.items() if way.start != "healthy"}
    assert first["rescues"]["late"]["repair"]["seconds"] > 0
    CliRunner().invoke(gpt2.main, [*command, "1,4"], catch_exceptions=False)
    second = json.loads(out.read_text(encoding="utf-8"))
    assert second["range"][:2] == first["range"]
    assert [row["multiple"] for row in second["range"]] == [1, 1, 4, 4]
    assert second["rescues"] == first["rescues"]
