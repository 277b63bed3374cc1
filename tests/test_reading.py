# SPDX-License-Identifier: Apache-2.0
"""Deferred decisions: the same ones, a step later, and no number is read in the step that makes it."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pss_param.attaching import attach
from pss_param.detector import AnyOf, GradientNormRatio
from pss_param.errors import ArgumentError, NonFiniteError
from pss_param.floor import StableRankFloor
from pss_param.policy import GuardPolicy
from pss_param.reading import Reading, read_now

NORMS = [1.0, 1.1, 0.9, 1.0, 6.0, 1.0, 1.1, 9.0, 1.0, 1.0]


def guarded(detector=None, **policy):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    detector = GradientNormRatio(settle=2) if detector is None else detector
    return model, attach(model, targets="all", detector=detector, policy=GuardPolicy(**policy))


def backward(model):
    model(torch.ones(2, 8)).sum().backward()


def decisions(guard, model, norms):
    events = []
    for norm in norms:
        backward(model)
        events.append(guard.step(grad_norm=torch.tensor(norm)))
        model.zero_grad()
    return events


def test_decisions_come_one_step_later():
    model, guard = guarded(deferred=True)
    late = decisions(guard, model, NORMS)
    model, guard = guarded()
    now = decisions(guard, model, NORMS)
    assert sum(event.triggered for event in now) == 2
    assert [event.triggered for event in late] == [False, *[event.triggered for event in now][:-1]]
    assert [event.norm for event in late[1:]] == [event.norm for event in now[:-1]]
    assert math.isnan(late[0].norm)
    assert late[0].reason


class Fresh(torch.Tensor):
    """A number that must not be read in the step in which it was made."""

    step = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in {"item", "tolist", "__float__", "__bool__", "__int__", "cpu", "numpy"}:
            assert args[0].born < cls.step, f"{func.__name__} made the host wait for this step"
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, Fresh):
            result.born = cls.step
        return result


def fresh(value):
    tensor = torch.tensor(value).as_subclass(Fresh)
    tensor.born = Fresh.step
    return tensor


def test_nothing_of_a_step_is_read_in_that_step():
    model, guard = guarded(deferred=True)
    for Fresh.step, norm in enumerate(NORMS):
        backward(model)
        guard.step(grad_norm=fresh(norm))
    assert guard.triggers == 2
    model, guard = guarded()
    backward(model)
    with pytest.raises(AssertionError, match="made the host wait"):
        guard.step(grad_norm=fresh(1.0))


def test_measurements_travel_with_the_norm():
    detector = AnyOf(GradientNormRatio(settle=2), StableRankFloor(period=1, fraction=0.9))
    model, guard = guarded(detector, deferred=True)
    decisions(guard, model, [1.0] * 3)
    with torch.no_grad():
        model[1].weight.add_(5.0)
    events = decisions(guard, model, [1.0] * 8)
    assert not events[0].triggered
    assert ("1.weight",) in [event.smoothed for event in events]


def test_a_gradient_that_is_not_finite_never_reaches_the_optimizer():
    model, guard = guarded(deferred=True, max_nonfinite=2)
    decisions(guard, model, [1.0] * 3)
    backward(model)
    model[0].weight.grad[0, 0] = math.nan
    guard.step()
    assert all(not parameter.grad.any() for parameter in model.parameters())
    model.zero_grad()
    (event,) = decisions(guard, model, [math.inf])
    assert (event.triggered, event.skip) == (False, False)
    assert "had zeros for gradients" in event.reason
    backward(model)
    with pytest.raises(NonFiniteError, match="2 steps in a row"):
        guard.step(grad_norm=1.0)


def test_a_resumed_run_knows_the_number_that_was_under_way():
    model, guard = guarded(deferred=True)
    decisions(guard, model, NORMS[:5])
    buffer = io.BytesIO()
    torch.save(guard.state_dict(), buffer)
    buffer.seek(0)
    twin_model, twin = guarded(deferred=True)
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    ours, theirs = decisions(guard, model, NORMS[5:]), decisions(twin, twin_model, NORMS[5:])
    assert ours == theirs
    assert ours[0].triggered, "the spike of step 5 is judged in step 6"


def test_a_spike_that_is_gone_cannot_be_clipped():
    with pytest.raises(ArgumentError, match="on_trigger must be 'smooth'"):
        GuardPolicy(deferred=True, on_trigger="smooth_and_skip")


READING = {"item", "tolist", "__float__", "__bool__", "__int__", "cpu", "numpy", "equal"}


class Reads(TorchFunctionMode):
    """Notes every tensor whose value the host waits for, and counts the other operations."""

    def __init__(self):
        super().__init__()
        self.read, self.others = [], 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READING:
            self.read.append(args[0])
        elif func not in ASKING:
            self.others += 1
        return func(*args, **(kwargs or {}))


ASKING = {torch.Tensor.numel, torch.Tensor.requires_grad.__get__, torch.Tensor.grad.__get__}


def test_a_quiet_step_reads_the_norm_and_touches_no_other_tensor():
    model, guard = guarded()
    for _ in range(4):
        backward(model)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with Reads() as seen:
            event = guard.step(norm)
        assert not event.triggered
        assert len(seen.read) == 1
        assert seen.read[0] is norm
        assert seen.others == 0


def test_between_two_measurements_the_floor_adds_no_read_of_a_weight():
    model, guard = guarded(AnyOf(GradientNormRatio(settle=2), StableRankFloor(period=100)))
    guard.detector.members[1].step = guard.detector.members[1].seen = 1000  # long after the dense looks at the start
    backward(model)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with Reads() as seen:
        guard.step(norm)
    assert len(seen.read) == 1
    assert seen.read[0] is norm


def test_measurements_are_read_together_with_the_norm():
    _, guard = guarded(AnyOf(GradientNormRatio(settle=2), StableRankFloor(period=1)))
    looks = guard.detector.look(guard._matrices)
    with Reads() as seen:
        norm, (measured,) = read_now(torch.tensor(2.0), looks)
    assert (norm, len(measured)) == (2.0, 4)  # stable ranks, then norms
    assert len(seen.read) == 1


def test_a_deferred_step_reads_what_the_step_before_has_sent_and_nothing_else():
    model, guard = guarded(deferred=True)
    sent = None
    for _ in range(4):
        backward(model)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with Reads() as seen:
            guard.step(norm)
        assert [id(tensor) for tensor in seen.read] == ([] if sent is None else [id(sent)])
        sent = guard._deferred._packed


def test_a_norm_of_several_numbers_is_refused():
    model, guard = guarded()
    backward(model)
    with pytest.raises(ArgumentError, match="one number"):
        guard.step(torch.ones(3))


def test_values_come_back_in_their_order():
    looks = [torch.tensor([1.0, 2.0]), torch.empty(0), torch.tensor([3.0])]
    assert Reading(0.5, looks).send().read() == (0.5, [[1.0, 2.0], [], [3.0]])
