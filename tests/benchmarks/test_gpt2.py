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

STORED = gpt2.stored()


def test_the_readme_shows_the_stored_figures(tmp_path):
    copy = tmp_path / "README.md"
    shutil.copy(gpt2.README, copy)
    report.put(copy, STORED)
    assert copy.read_text(encoding="utf-8") == gpt2.README.read_text(encoding="utf-8"), (
        "run python examples/benchmarks/gpt2.py --report"
    )


def test_the_command_that_writes_the_table_measures_nothing():
    before = gpt2.README.read_bytes()
    CliRunner().invoke(gpt2.main, ["--report"], catch_exceptions=False)
    assert (gpt2.README.read_bytes(), gpt2.stored()) == (before, STORED)


def test_every_figure_says_which_code_made_it():
    for found in (found for seeds in STORED for found in seeds):
        assert {"device", "torch", "transformers", "pss_param"} <= found["versions"].keys()
        ways = (way for death in found["rescues"].values() for way in death["ways"].values())
        assert all(each["commit"] for each in (*found["range"], *ways))


def row(multiple: float, final: float, *, dead: bool = False, method: str = "nothing") -> dict[str, object]:
    return {"method": method, "multiple": multiple, "final": final, "dead": dead}


def death(*ways: str, dead: bool = True) -> dict[str, object]:
    repair = {"seconds": 7.6 if dead else 5.2}
    return {"kind": "late", "deadly": 64.0, "dead": dead, "repair": repair, "ways": {way: row(1, 3.0) for way in ways}}


def test_what_died_and_what_was_not_measured_is_shown_as_such():
    found = STORED[0][0] | {"range": [row(1, 2.0), row(4, 9.0, dead=True, method="warmup")], "rescues": {}}
    text = report.section([found])
    assert "one seed" in text
    assert "| nothing | 2.00 | - |" in text
    assert "| warmup | - | dead |" in text
    assert "After a death" not in text


def test_seeds_become_a_mean_and_a_spread():
    first = STORED[0][0] | {"range": [row(1, 2.0), row(4, 3.0)], "rescues": {"late-64": death("repair", "restart")}}
    second = first | {"range": [row(1, 4.0), row(4, 9.0, dead=True)]}
    second["rescues"] = {"late-64": death("repair", dead=False)}
    text = report.section([first, second])
    assert "2 seeds, mean" in text
    assert "| nothing | 3.00 ± 1.41 | 3.00, 1 of 2 dead |" in text
    assert "| then | late, at 0.0096: dead in 1 of 2 |" in text
    assert "| repair | 3.00 ± 0.00 |" in text
    assert "| restart | 3.00 (1 seed) |" in text
    assert "took 5 to 8 s" in text


@pytest.mark.slow
def test_a_small_network_is_measured_and_taken_up_again(tmp_path, monkeypatch):
    from large import text

    some = text.modules()[:40]
    monkeypatch.setattr(text, "modules", lambda: some)
    out = tmp_path / "gpt2.json"
    command = ["--size", "tiny", "--device", "cpu", "--methods", "nothing,pss-default", "--early", "64", "--late", "64"]
    command += ["--seed", "1", "--json", str(out), "--multiples"]
    CliRunner().invoke(gpt2.main, [*command, "1"], catch_exceptions=False)
    first = json.loads(out.read_text(encoding="utf-8"))
    assert first["seed"] == 1
    assert [row["method"] for row in first["range"]] == ["nothing", "pss-default"]
    assert set(first["rescues"]["late-64"]["ways"]) == set(WAYS)
    assert set(first["rescues"]["early-64"]["ways"]) == {name for name, way in WAYS.items() if way.start != "healthy"}
    assert first["rescues"]["late-64"]["repair"]["seconds"] > 0
    CliRunner().invoke(gpt2.main, [*command, "1,4"], catch_exceptions=False)
    second = json.loads(out.read_text(encoding="utf-8"))
    assert second["range"][:2] == first["range"]
    assert [row["multiple"] for row in second["range"]] == [1, 1, 4, 4]
    assert second["rescues"] == first["rescues"]
