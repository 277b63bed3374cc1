# SPDX-License-Identifier: Apache-2.0
"""The distributed examples really train: they die without the guard and live with it, and go on elsewhere."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
UNIGRAM = 3.26  # entropy of the bytes, in nats: what a dead model is left with


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the examples are in the repository only"),
]


@pytest.fixture
def program(monkeypatch):
    """Imports an example by its name, as the processes do that it starts."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield importlib.import_module
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("stack", ["ddp", "fsdp"])
def test_it_dies_without_the_guard_and_lives_with_it(stack, program):
    main = program("train_distributed").main
    assert main(stack, guarded=False) > UNIGRAM - 0.15
    assert main(stack, guarded=True) < UNIGRAM - 0.3


def test_two_dimensions_die_without_the_guard_and_live_with_it(program):
    main = program("train_tensor_parallel").main
    assert main(guarded=False) > UNIGRAM - 0.15
    assert main(guarded=True) < UNIGRAM - 0.3


def test_a_run_goes_on_from_its_checkpoint_on_two_processes(program):
    before, after = program("distributed_checkpoint").main()
    assert len(before) == 6
    assert after == pytest.approx(before, abs=0.05)
    assert after[0] == pytest.approx(before[0], rel=1e-5)
