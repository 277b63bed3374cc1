# SPDX-License-Identifier: Apache-2.0
"""The distributed example really trains: it dies without the guard and lives with it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
UNIGRAM = 3.26  # entropy of the bytes, in nats: what a dead model is left with


@pytest.mark.slow
@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the examples are in the repository only")
@pytest.mark.parametrize("stack", ["ddp", "fsdp"])
def test_the_example_dies_without_the_guard_and_lives_with_it(stack, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))  # the processes it starts import it by name
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    main = importlib.import_module("train_distributed").main
    assert main(stack, guarded=False) > UNIGRAM - 0.15
    assert main(stack, guarded=True) < UNIGRAM - 0.3
    sys.modules.pop("train_distributed")
