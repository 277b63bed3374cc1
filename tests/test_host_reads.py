# SPDX-License-Identifier: Apache-2.0
"""The host waits for the device once a step, for the norm; with deferred decisions never.

Counted where torch dispatches: every way of Python to a number of a tensor (``item``, ``float``, ``if tensor``) runs
``aten::_local_scalar_dense``, whatever the device; ``tolist`` of a tensor that is on the host already does not.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pss_param.attaching import attach
from pss_param.detector import Detector, GradientNormRatio
from pss_param.policy import GuardPolicy

WAITING = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"}


class Waits(TorchDispatchMode):
    """Counts the operations for whose result the host has to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func.name().split(".")[0] in WAITING
        return func(*args, **(kwargs or {}))


def waits_of_steps(steps: int, detector: Detector | None, norm_by_guard: bool, **policy: bool) -> list[int]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    guard, counts = attach(model, targets="all", detector=detector, policy=GuardPolicy(**policy)), []
    for step in range(steps):
        model.zero_grad()
        model(torch.randn(8, 16, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        norm = None if norm_by_guard else nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with Waits() as seen:
            assert not guard.step(norm).triggered
        counts.append(seen.count)
    return counts


def test_the_counter_sees_every_way_to_a_number() -> None:
    x = torch.ones(1)
    for look in (x.item, lambda: float(x), lambda: bool(x > 0), lambda: int(x)):
        with Waits() as seen:
            look()
        assert seen.count == 1


@pytest.mark.parametrize("norm_by_guard", [False, True])
def test_a_quiet_step_waits_for_the_norm_and_for_nothing_else(norm_by_guard: bool) -> None:
    assert waits_of_steps(30, GradientNormRatio(), norm_by_guard) == [1] * 30


@pytest.mark.parametrize("norm_by_guard", [False, True])
@pytest.mark.parametrize("detector", [GradientNormRatio, lambda: None], ids=["ratio", "default"])
def test_a_deferred_step_waits_for_nothing(norm_by_guard: bool, detector: type) -> None:
    assert waits_of_steps(30, detector(), norm_by_guard, deferred=True) == [0] * 30
