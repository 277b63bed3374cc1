# SPDX-License-Identifier: Apache-2.0
"""A task: a network, what it learns from, an optimizer, and the rates at which it learns, dies early and dies late."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from .data import SYMBOLS, Batch, Digits, MaskedCharacter, NextCharacter
from .networks import CharacterLSTM, Perceptron, ResNet, Shape, TextTransformer, VisionTransformer

Source = NextCharacter | MaskedCharacter | Digits


@dataclass(frozen=True)
class Task:
    """One network to train, one way to train it.

    Args:
        name: network and optimizer.
        build: makes the network from the global seed.
        source: of batches.
        optimizer: ``adamw``, ``sgd`` or ``muon``.
        lr: rate at which it learns well.
        steps: length of a run.
        early_lr: rate that kills from the start.
        kill_lr: rate that kills a network that has learned.
        kill_steps: how many steps at ``kill_lr`` that takes.
    """

    name: str
    build: Callable[[], nn.Module]
    source: Source
    optimizer: str
    lr: float
    steps: int
    early_lr: float
    kill_lr: float
    kill_steps: int

    def batches(self, seed: int) -> Iterator[Batch]:
        """An endless stream, the same for the same seed."""
        return self.source.batches(seed)

    @property
    def held_out(self) -> Batch:
        """One batch that is never trained on."""
        return self.source.held_out

    @property
    def trivial(self) -> float:
        """Loss in nats of a predictor that ignores its input."""
        return self.source.trivial


def evaluate(model: nn.Module, task: Task) -> float:
    """Mean loss on the held-out batch, in nats, in evaluation mode; the mode is put back."""
    training = model.training
    model.eval()
    with torch.no_grad():
        loss = float(model.loss(task.held_out))
    model.train(training)
    return loss


POST_GPT = Shape(width=64, layers=4, heads=4, post_norm=True)
GPT = Shape(width=64, layers=6, heads=2, table_std=0.02)
DEEP = Shape(width=48, layers=24, heads=2, bias=False, table_std=0.02)
BERT = Shape(width=64, layers=2, heads=4, post_norm=True, causal=False, waves=True)
VIT = Shape(width=48, layers=4, heads=2, post_norm=True, causal=False)
TEXT = NextCharacter(size=8, context=32)
SHORT_TEXT = NextCharacter(size=4, context=32)
CLOZE = MaskedCharacter(size=16, context=24, share=0.2)
DIGITS, FEW_DIGITS = Digits(size=32), Digits(size=16)


def transformer(source: NextCharacter | MaskedCharacter, shape: Shape) -> partial[TextTransformer]:
    """How to build a transformer for a source of text; one more input symbol where characters are hidden."""
    hidden = int(isinstance(source, MaskedCharacter))
    return partial(TextTransformer, SYMBOLS + hidden, SYMBOLS, source.context, shape)


# Note [How the rates were found]
# Every network was trained with two seeds, without warm-up, at multiples of `lr` up to 64 (the slow ones not at every
# power of two). `lr` is near the best constant rate; `early_lr` is the least multiple tried that killed both runs by
# the suite's definition. For late deaths a network was trained for `steps` at `lr`, for `kill_steps` at `kill_lr`, and
# for 200 steps at `lr` with the same optimizer: it ended dead with both seeds. To kill the LSTM and the convolutional
# network late took rates at which their heads blow up too: the loss passes through values far above the trivial one.
TASKS = (
    Task("gpt-postln-adamw", transformer(TEXT, POST_GPT), TEXT, "adamw", 1e-3, 300, 1.6e-2, 3.2e-2, 40),
    Task("gpt-preln-adamw", transformer(SHORT_TEXT, GPT), SHORT_TEXT, "adamw", 2e-3, 300, 6.4e-2, 1.28e-1, 40),
    Task("gpt-preln-muon", transformer(SHORT_TEXT, GPT), SHORT_TEXT, "muon", 6e-3, 300, 9.6e-2, 3.84e-1, 40),
    Task("bert-adamw", transformer(CLOZE, BERT), CLOZE, "adamw", 2e-3, 600, 8e-3, 6.4e-2, 40),
    Task("gpt-deep-adamw", transformer(SHORT_TEXT, DEEP), SHORT_TEXT, "adamw", 1e-3, 300, 3.2e-2, 1.28e-1, 40),
    Task("vit-adamw", partial(VisionTransformer, 2, VIT), FEW_DIGITS, "adamw", 1e-3, 250, 1.6e-2, 1.6e-2, 40),
    Task("cnn-sgd", partial(ResNet, 16, 3), DIGITS, "sgd", 0.2, 250, 3.2, 6.4, 40),
    Task("mlp-adamw", partial(Perceptron, 64, 24), DIGITS, "adamw", 1e-3, 250, 1.6e-2, 3.2e-2, 40),
    Task("mlp-sgd", partial(Perceptron, 64, 24), DIGITS, "sgd", 1e-2, 250, 0.16, 0.12, 40),
    Task("lstm-adamw", partial(CharacterLSTM, SYMBOLS, 128, 2), SHORT_TEXT, "adamw", 1e-2, 300, 0.64, 1.6, 60),
)


def tasks() -> dict[str, Task]:
    """The tasks by name; data is read when it is first asked for."""
    return {task.name: task for task in TASKS}
