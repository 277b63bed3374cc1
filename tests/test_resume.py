# SPDX-License-Identifier: Apache-2.0
"""A run is killed with SIGKILL and resumed from what it had saved; nothing in it can tell."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pss_param.attaching import attach
from pss_param.detector import AnyOf, GradientNormRatio
from pss_param.floor import StableRankFloor
from pss_param.policy import GuardPolicy

STEPS = 40


def start():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))
    # So nervous that gates are open at every other step.
    detector = AnyOf(GradientNormRatio(threshold=1.1, settle=1), StableRankFloor(period=3))
    # "auto" would look at what other tests of this process have compiled, which the resumed process has not.
    guard = attach(model, detector=detector, policy=GuardPolicy(max_trigger_rate=1, prepare="lazy"))
    return model, guard, torch.optim.AdamW(model.parameters(), lr=1e-2)


def one_step(run, step):
    model, guard, optimizer = run
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True).sin())
    loss.backward()
    guard.step()
    optimizer.step()
    return loss.item()


def save(run, step, folder):
    temporary = folder / "temporary.pt"
    torch.save({"step": step, "open": run[1].is_open, "parts": [part.state_dict() for part in run]}, temporary)
    os.replace(temporary, folder / "last.pt")
    os.link(folder / "last.pt", folder / f"{step}.pt")


def train_and_save_every_step(folder):
    run = start()
    for step in range(STEPS):
        one_step(run, step)
        save(run, step, folder)
        print(step, flush=True)


def resumed(path):
    run = start()
    one_step(run, 999)  # a run that had gone elsewhere
    saved = torch.load(path, weights_only=True)
    for part, state in zip(run, saved["parts"], strict=True):
        part.load_state_dict(state)
    return run, saved


@pytest.fixture(scope="module")
def uninterrupted():
    run = start()
    return [one_step(run, step) for step in range(STEPS)], run[0].state_dict(), run[1].triggers


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The checkpoints that a killed process left, one a step."""
    folder = tmp_path_factory.mktemp("killed")
    program = f"import sys; sys.path[:0] = {sys.path!r}; import test_resume; from pathlib import Path\n"
    program += f"test_resume.train_and_save_every_step(Path({str(folder)!r}))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:
            if int(line) == STEPS // 2:
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    return folder


def test_resuming_the_killed_run_gives_the_bits_of_the_uninterrupted_one(killed, uninterrupted):
    losses, weights, triggers = uninterrupted
    run, saved = resumed(killed / "last.pt")
    assert saved["step"] >= STEPS // 2 - 1
    rest = [one_step(run, step) for step in range(saved["step"] + 1, STEPS)]
    assert rest == losses[saved["step"] + 1 :]
    assert all(torch.equal(weights[key], value) for key, value in run[0].state_dict().items())
    assert run[1].triggers == triggers > 5


def test_every_checkpoint_of_it_resumes_exactly_those_with_open_gates_too(killed, uninterrupted):
    losses, _, _ = uninterrupted
    gates = set()
    for step in range(STEPS // 2):
        run, saved = resumed(killed / f"{step}.pt")
        gates.add(saved["open"])
        for following in range(step + 1, min(step + 6, STEPS)):
            assert one_step(run, following) == losses[following]
    assert gates == {True, False}
