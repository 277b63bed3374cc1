# SPDX-License-Identifier: Apache-2.0
"""Real training: a network that dies without the guard and learns with it, in every kind of plain loop."""

import logging

import pytest
import tiny_gpt
import torch
from loops import ALIVE, DEAD, one_thread
from torch import nn

from pss_param.attaching import attach
from pss_param.detector import GradientNormRatio
from pss_param.errors import StateError
from pss_param.policy import GuardPolicy

STEPS = 160
GENTLER = 7e-3
"""A rate that kills most runs, which the published detector alone keeps alive; at `tiny_gpt.RATE` it does not."""


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def plain_loop(model, guard, optimizer, steps=STEPS, size=None):
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = tiny_gpt.loss_of(model, step, size or tiny_gpt.Size())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if guard is not None:
            guard.step(norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


def scaled_bf16_accumulating_loop(model, guard, optimizer, steps=STEPS):
    scaler, losses = torch.amp.GradScaler("cpu", init_scale=1024.0), []
    halves = tiny_gpt.Size(batch=4)
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = tiny_gpt.loss_of(model, 2 * step + part, halves) / 2
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        guard.step()
        scaler.step(optimizer)
        scaler.update()
        losses.append(2 * loss.item())
    return losses


def start(recompute=False, rate=tiny_gpt.RATE, **options):
    model = tiny_gpt.build(recompute=recompute)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    return model, attach(model, **options), optimizer


def test_the_plain_run_dies_though_it_clips():
    model = tiny_gpt.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=tiny_gpt.RATE)
    assert tiny_gpt.mean_of_last(plain_loop(model, None, optimizer)) > DEAD


def test_the_guarded_run_lives():
    model, guard, optimizer = start()
    assert tiny_gpt.mean_of_last(plain_loop(model, guard, optimizer)) < ALIVE


def test_the_published_detector_keeps_it_alive_too_and_seldom_smooths():
    model, guard, optimizer = start(rate=GENTLER, detector=GradientNormRatio())
    assert tiny_gpt.mean_of_last(plain_loop(model, guard, optimizer)) < ALIVE
    assert 1 <= guard.triggers <= 5


def test_scaler_accumulation_bf16_and_recomputation_work_together():
    model, guard, optimizer = start(recompute=True, detector=tiny_gpt.FiresAt(5))
    losses = scaled_bf16_accumulating_loop(model, guard, optimizer, 12)
    assert losses[-1] < losses[0] - 0.5
    assert all(view.openings == 1 for view in guard.views.values())


def test_recomputation_changes_no_bit_of_a_guarded_run():
    runs = []
    for recompute in (False, True):
        model, guard, optimizer = start(recompute, detector=tiny_gpt.FiresAt(2, 4))
        runs.append(plain_loop(model, guard, optimizer, steps=6))
        assert guard.triggers == 2
    assert runs[0] == runs[1]


@pytest.mark.parametrize("choice", ["smooth_and_clip", "smooth_and_skip"])
def test_what_happens_to_the_spiking_gradient_reaches_the_optimizer(choice):
    model, guard, optimizer = start(
        detector=GradientNormRatio(settle=3), policy=GuardPolicy(on_trigger=choice, reset_moments=True)
    )
    for step in range(4):
        optimizer.zero_grad()
        (tiny_gpt.loss_of(model, step) * (50 if step == 3 else 1)).backward()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        event = guard.step(optimizer=optimizer)
        optimizer.step()
    assert event.triggered
    unchanged = all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert unchanged == (choice == "smooth_and_skip")
    guard.step(1.0, optimizer=optimizer)  # folds and resets
    cleared = {name for name, weight in model.named_parameters() if weight not in optimizer.state}
    assert cleared == set(guard.views)


# The fallback: a hook on the optimizer.


def test_watch_does_the_same_as_a_line_in_the_loop():
    results = []
    for watching in (False, True):
        model, guard, optimizer = start(detector=tiny_gpt.FiresAt(2, 4))
        if watching:
            guard.watch(optimizer)
        for step in range(6):
            optimizer.zero_grad()
            tiny_gpt.loss_of(model, step).backward()
            if not watching:
                guard.step()
            optimizer.step()
        assert guard.steps == 6
        assert guard.triggers == 2
        results.append(model.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_watch_is_idempotent_and_ends_with_its_handle_or_the_guard():
    model, guard, optimizer = start()
    handle = guard.watch(optimizer)
    assert guard.watch(optimizer) is handle
    tiny_gpt.loss_of(model, 0).backward()
    with pytest.raises(StateError, match="watches another optimizer"):
        guard.watch(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(StateError, match="twice"):
        guard.step()
    optimizer.step()
    handle.remove()
    handle.remove()
    optimizer.step()
    assert guard.steps == 1
    guard.step()
    assert guard.watch(optimizer) is not handle
    guard.detach()
    optimizer.step()
    assert guard.steps == 2


@pytest.mark.parametrize("fused", [False, True])
def test_watch_under_a_scaler_sees_true_gradients_and_skips_with_it(fused):
    model = tiny_gpt.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    guard = attach(model, detector=GradientNormRatio())
    guard.watch(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    seen = []
    for step in range(4):
        optimizer.zero_grad()
        loss = tiny_gpt.loss_of(model, 0) * (float("inf") if step == 1 else 1.0)
        scaler.scale(loss).backward()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        changed = any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
        assert changed == (step != 1)
        seen.append(float(guard.detector.average))
    assert 0.1 < seen[0] < 20
    assert seen[1] == seen[0]
    assert scaler.get_scale() == 2.0**11


def test_watch_warns_when_it_can_only_see_clipped_gradients(caplog):
    for bound in (1e9, 0.5):
        model, guard, optimizer = start()
        guard.watch(optimizer)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="pss_param"):
            for step in range(8):
                optimizer.zero_grad()
                tiny_gpt.loss_of(model, step).backward()
                nn.utils.clip_grad_norm_(model.parameters(), bound)
                optimizer.step()
        told = [message for message in caplog.messages if "clipped before" in message]
        assert len(told) == (bound == 0.5)


def test_closures_are_refused_in_words():
    model, guard, optimizer = start()

    def closure():
        optimizer.zero_grad()
        loss = tiny_gpt.loss_of(model, 0)
        loss.backward()
        return loss

    handle = guard.watch(optimizer)
    for call in (lambda: optimizer.step(closure), lambda: optimizer.step(closure=closure)):
        with pytest.raises(StateError, match="without a closure"):
            call()
    handle.remove()
    newton = torch.optim.LBFGS(model.parameters())
    with pytest.raises(StateError, match="LBFGS"):
        guard.watch(newton)
    with pytest.raises(StateError, match="LBFGS"):
        guard.step(1.0, optimizer=newton)

    def guarded():
        loss = closure()
        guard.step()
        return loss

    with pytest.raises(StateError, match="LBFGS"):
        newton.step(guarded)
    optimizer.step(guarded)  # one evaluation a step is a plain loop
    assert guard.steps == 1
