# SPDX-License-Identifier: Apache-2.0
"""What the networks learn from: Python's own documentation, character by character, and scikit-learn's digits.

Every source has ``batches(seed)``, an endless stream of its own generator; ``held_out``, one fixed batch that is never
trained on; and ``trivial``, the loss in nats of a predictor that ignores its input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from pss_param.cli.demo_text import ALPHABET, load_text
from torch import Tensor

Batch = tuple[Tensor, Tensor]
"""Inputs and targets."""

SYMBOLS = len(ALPHABET)
MASK = SYMBOLS
"""The symbol that hides a character."""
IGNORED = -100
"""The target of a character that nobody asks for; :func:`torch.nn.functional.cross_entropy` leaves it out."""
HELD_OUT_WINDOWS = 128

text = cache(load_text)


@dataclass(frozen=True)
class NextCharacter:
    """Windows of the text, and for each character the one that follows.

    Args:
        size: windows per batch.
        context: characters per window.
    """

    size: int
    context: int

    def batches(self, seed: int) -> Iterator[Batch]:
        """Draw windows of the training part for ever, each batch two ``(size, context)`` int64."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield text().batch(self.size, self.context, generator)

    @cached_property
    def held_out(self) -> Batch:
        """128 windows, evenly spread over pages that are never trained on."""
        return text().exam(self.context, HELD_OUT_WINDOWS)

    @cached_property
    def trivial(self) -> float:
        """Loss of the character frequencies alone."""
        return text().unigram_loss(self.context)


@dataclass(frozen=True)
class MaskedCharacter:
    """Windows of the text with some characters hidden, which are to be guessed.

    Args:
        size: windows per batch.
        context: characters per window.
        share: of characters that are hidden; all of them by :data:`MASK`.
    """

    size: int
    context: int
    share: float

    def batches(self, seed: int) -> Iterator[Batch]:
        """Draw windows of the training part for ever, each batch two ``(size, context)`` int64."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self._hide(text().batch(self.size, self.context, generator)[0], generator)

    @cached_property
    def held_out(self) -> Batch:
        """128 windows of pages that are never trained on, always with the same characters hidden."""
        return self._hide(text().exam(self.context, HELD_OUT_WINDOWS)[0], torch.Generator().manual_seed(0))

    @cached_property
    def trivial(self) -> float:
        """Loss of the character frequencies alone."""
        counts = torch.bincount(text().train, minlength=SYMBOLS).double() + 1
        _, targets = self.held_out
        return float(F.nll_loss((counts / counts.sum()).log().expand(targets.numel(), -1), targets.flatten()))

    def _hide(self, characters: Tensor, generator: torch.Generator) -> Batch:
        hidden = torch.rand(characters.shape, generator=generator) < self.share
        return characters.masked_fill(hidden, MASK), characters.masked_fill(~hidden, IGNORED)


@cache
def digits() -> tuple[Batch, Batch]:
    """Load the 1,797 digits: two thirds to learn from, the last third held out.

    Returns:
        Both parts; images ``(n, 1, 8, 8)`` float32 of mean 0 and standard deviation 1, and labels ``(n,)`` int64.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None]
    images, labels = (images - images.mean()) / images.std(), torch.from_numpy(found.target)
    kept = len(labels) * 2 // 3
    return (images[:kept], labels[:kept]), (images[kept:], labels[kept:])


@dataclass(frozen=True)
class Digits:
    """Images of handwritten digits and what they show.

    Args:
        size: images per batch, drawn with replacement.
    """

    size: int

    def batches(self, seed: int) -> Iterator[Batch]:
        """Draw images of the training part for ever: ``(size, 1, 8, 8)`` float32 and ``(size,)`` int64."""
        generator = torch.Generator().manual_seed(seed)
        images, labels = digits()[0]
        while True:
            chosen = torch.randint(len(labels), (self.size,), generator=generator)
            yield images[chosen], labels[chosen]

    @property
    def held_out(self) -> Batch:
        """The last 599 digits, which other people wrote."""
        return digits()[1]

    @property
    def trivial(self) -> float:
        """Entropy of ten equally frequent classes."""
        return math.log(10)
