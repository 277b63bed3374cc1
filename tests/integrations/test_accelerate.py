# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from safetensors.torch import load_file
from scripted import UNIGRAM, OnSteps, example, same
from torch import nn

from pss_param import AnyOf, GradientNormRatio, StableRankFloor, attach

accelerate = pytest.importorskip("accelerate")


class Run:
    """A plain loop under accelerate, with accumulation over two batches."""

    def __init__(self):
        torch.manual_seed(0)
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.notes = []
        scripted = OnSteps(2, 3, 5, notes=self.notes)
        detector = AnyOf(scripted, GradientNormRatio(settle=2), StableRankFloor(period=2))
        self.guard = attach(self.model, targets="all", detector=detector)
        self.accelerator.register_for_checkpointing(self.guard)

    def train(self, start, stop):
        losses = []
        for step in range(start, stop):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            with self.accelerator.accumulate(self.model):
                loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.guard.step(self.accelerator.clip_grad_norm_(self.model.parameters(), 0.01))
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses


def test_the_example_dies_without_the_guard_and_lives_with_it():
    main = example("train_with_accelerate")
    assert main(guarded=False) > UNIGRAM - 0.15
    assert main(guarded=True) < UNIGRAM - 0.3


@pytest.mark.parametrize("stop", [4, 6, 8])
def test_save_state_takes_the_guard_along_bit_for_bit(tmp_path, stop):
    run = Run()
    run.train(0, stop)
    was_open = run.guard.is_open
    run.accelerator.save_state(str(tmp_path))
    expected = run.train(stop, stop + 8)
    other = Run()
    other.train(0, 2)  # a run that had gone elsewhere
    other.accelerator.load_state(str(tmp_path))
    assert other.train(stop, stop + 8) == expected
    assert same(run.model.state_dict(), other.model.state_dict())
    assert (run.guard.steps, run.guard.triggers) == (other.guard.steps, other.guard.triggers)
    assert was_open or stop == 8


def test_the_saved_weights_are_plain_and_the_norm_is_that_before_clipping(tmp_path):
    run = Run()
    run.train(0, 4)
    assert len(run.notes) == 2  # once per optimizer step
    assert min(run.notes) > 0.1
    run.accelerator.save_state(str(tmp_path))
    saved = load_file(tmp_path / "model.safetensors")
    assert sorted(saved) == sorted(f"{i}.{name}" for i in (0, 2, 4) for name in ("weight", "bias"))
