# SPDX-License-Identifier: Apache-2.0
r"""The text of the demo: the manual pages that every CPython carries in :mod:`pydoc_data.topics`."""

import math
from dataclasses import dataclass

import click
import torch
from torch import Tensor

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
"""Newline and the printable ASCII characters; everything else is left out of the text."""

_PAGE = 1024
_HELD_OUT_EVERY = 20


@dataclass(frozen=True)
class Text:
    r"""A text as character numbers, in two parts.

    Args:
        train: ``(n,)`` int64, what is learned from.
        held_out: ``(m,)`` int64, every twentieth page of 1024 characters, never trained on.
    """

    train: Tensor
    held_out: Tensor

    def batch(self, size: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        r"""Draw random windows of the training part.

        Args:
            size: how many.
            context: characters per window.
            generator: source of randomness.

        Returns:
            Inputs and the characters that follow them, each ``(size, context)``.
        """
        starts = torch.randint(len(self.train) - context, (size, 1), generator=generator)
        windows = self.train[starts + torch.arange(context + 1)]
        return windows[:, :-1], windows[:, 1:]

    def exam(self, context: int, windows: int = 128) -> tuple[Tensor, Tensor]:
        r"""Take the windows on which every network is measured; always the same, spread over the held-out part.

        Args:
            context: characters per window.
            windows: how many.

        Returns:
            Inputs and the characters that follow them, each ``(windows, context)``.
        """
        starts = torch.linspace(0, len(self.held_out) - context - 1, windows).long()[:, None]
        found = self.held_out[starts + torch.arange(context + 1)]
        return found[:, :-1], found[:, 1:]

    def unigram_loss(self, context: int) -> float:
        r"""Loss of a network that knows how frequent each character is and nothing else.

        .. math:: -\frac1N \sum_i \log p(y_i)

        with the frequencies ``p`` of the training part and the characters ``y`` of the exam.

        Args:
            context: characters per window of the exam.

        Returns:
            Nats per character.
        """
        counts = torch.bincount(self.train, minlength=len(ALPHABET)).double() + 1
        return -float((counts / counts.sum()).log()[self.exam(context)[1]].mean())


def load_text() -> Text:
    r"""Read the text; nothing is downloaded.

    Returns:
        Both parts.

    Raises:
        ClickException: this Python was built without the pages.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise click.ClickException(
            "the demo learns from the text of pydoc_data.topics, which this Python lacks; use another Python"
        ) from None
    number = {character: index for index, character in enumerate(ALPHABET)}
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return split(torch.tensor([number[character] for character in text if character in number]))


def split(characters: Tensor) -> Text:
    r"""Hold every twentieth page out.

    Args:
        characters: ``(n,)`` character numbers.

    Returns:
        Both parts; the incomplete last page is left out.
    """
    pages = characters[: len(characters) // _PAGE * _PAGE].view(-1, _PAGE)
    held_out = torch.arange(len(pages)) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
    return Text(pages[~held_out].flatten(), pages[held_out].flatten())


UNIFORM_LOSS = math.log(len(ALPHABET))
"""Loss of a network that knows nothing, in nats per character."""
