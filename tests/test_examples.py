# SPDX-License-Identifier: Apache-2.0
"""Every example is short, and every one is run by some test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the examples are in the repository only")
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py")) if EXAMPLES.is_dir() else []


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_run_by_a_test(name):
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 80
    users = [path for path in HERE.rglob("test_*.py") if name in path.read_text(encoding="utf-8")]
    assert users, f"no test runs {name}"


def test_repair_checkpoint_as_a_program():
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "repair_checkpoint.py")], capture_output=True, text=True, check=True
    )
    assert "layers.2.mlp.up_proj.weight" in done.stdout
    assert "file and state dict agree: True" in done.stdout
