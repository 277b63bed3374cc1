# SPDX-License-Identifier: Apache-2.0
"""In every kind of plain loop a real run dies without the guard and lives with it."""

from __future__ import annotations

import pytest
import torch
from loops import ALIVE, DEAD, LOOPS, one_thread, run

QUICK = ("clipped",)
"""The others are slow: twice ten seconds each."""


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LOOPS]
)
def test_it_dies_without_the_guard_and_lives_with_it(name: str) -> None:
    torch._dynamo.reset()
    with one_thread():
        assert run(LOOPS[name], guarded=False) > DEAD
        assert run(LOOPS[name], guarded=True) < ALIVE
    torch._dynamo.reset()
