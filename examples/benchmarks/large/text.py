# SPDX-License-Identifier: Apache-2.0
"""The text that every Python carries, the modules of its standard library, in byte pairs learned on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

_HELD_OUT_EVERY = 20
EXAM_WINDOWS = 16


def modules() -> list[str]:
    """All modules of the standard library but its tests, in the order of their names."""
    root = Path(os.__file__).parent
    names = (path.relative_to(root) for path in sorted(root.rglob("*.py")))
    kept = (name for name in names if not {"site-packages", "test", "tests"} & {*name.parts})
    return [(root / name).read_text(encoding="utf-8", errors="replace") for name in kept]


@dataclass(frozen=True)
class Tokens:
    """Windows of tokens, and for each token the one that follows.

    Args:
        train: what is learned from.
        exam: every twentieth module, never trained on.
        vocabulary: number of different tokens.
        size: windows per batch.
        context: tokens per window.
    """

    train: Tensor
    exam: Tensor
    vocabulary: int
    size: int
    context: int

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw windows for ever, each batch two ``(size, context)`` int64 on the device of the tokens."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self._windows(
                self.train, torch.randint(len(self.train) - self.context, (self.size,), generator=generator)
            )

    @property
    def held_out(self) -> tuple[Tensor, Tensor]:
        """The same 16 windows always, evenly spread over modules that are never trained on."""
        return self._windows(self.exam, torch.linspace(0, len(self.exam) - self.context - 1, EXAM_WINDOWS).long())

    @cached_property
    def trivial(self) -> float:
        """Loss in nats of the token frequencies alone."""
        counts = torch.bincount(self.train, minlength=self.vocabulary).double() + 1
        targets = self.held_out[1].flatten()
        return float(F.nll_loss((counts / counts.sum()).log().expand(len(targets), -1), targets))

    def _windows(self, tokens: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        found = tokens[(starts[:, None] + torch.arange(self.context + 1)).to(tokens.device)]
        return found[:, :-1], found[:, 1:]


def tokens(vocabulary: int, size: int, context: int, device: str) -> Tokens:
    """Learn the encoding and encode; seconds to half a minute.

    Args:
        vocabulary: number of different tokens at most.
        size: windows per batch.
        context: tokens per window.
        device: where the tokens are to lie.

    Returns:
        The text.
    """
    from tokenizers import ByteLevelBPETokenizer

    texts = modules()
    encoder = ByteLevelBPETokenizer()
    encoder.train_from_iterator(texts, vocab_size=vocabulary, show_progress=False)
    parts = {"train": list[int](), "exam": list[int]()}
    for i, found in enumerate(encoder.encode_batch(texts)):
        parts["train" if i % _HELD_OUT_EVERY else "exam"].extend(found.ids)
    train, exam = (torch.tensor(part, device=device) for part in parts.values())
    return Tokens(train, exam, vocabulary, size, context)
