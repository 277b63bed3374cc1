# SPDX-License-Identifier: Apache-2.0
import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the examples are in the repository only")


def main_of(name):
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_guard_training(capsys):
    assert main_of("guard_training")() >= 1
    assert "smoothing 2 weights" in capsys.readouterr().out


def test_register_one_view(capsys):
    assert main_of("register_one_view")() >= 1
    assert "0.weight" in capsys.readouterr().out


def test_export_weights():
    assert main_of("export_weights")()


def test_amp_and_accumulation(capsys):
    assert main_of("amp_and_accumulation")(steps=4) < 6
    assert "4 steps" in capsys.readouterr().out
