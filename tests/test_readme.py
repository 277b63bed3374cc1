# SPDX-License-Identifier: Apache-2.0
"""The README's two commands are single lines that CI runs as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="a copy of the tests without the checkout")


def block_under(heading: str) -> list[str]:
    section = README.read_text(encoding="utf-8").split(f"## {heading}\n", 1)[1].split("\n## ")[0]
    found = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert found, f"no sh block under '## {heading}'"
    return found[1].strip().splitlines()


@pytest.mark.parametrize(("heading", "verb"), [("Run it", 'pss-repair" demo'), ("Test it", "pytest")])
def test_each_command_is_one_line_that_sets_everything_up(heading, verb):
    lines = block_under(heading)
    assert len(lines) == 1
    for part in ("python3 -m venv", "install", "-c tests/constraints.txt", verb):
        assert part in lines[0]


def test_ci_runs_the_test_command_from_the_readme():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert 'readme_command.py "Test it"' in script
    assert 'sh -eu "$work/test.sh"' in script


def test_the_readme_names_no_place_on_one_machine():
    assert not re.search(r"(/tmp/|/root/|/home/)\w", README.read_text(encoding="utf-8"))
