# SPDX-License-Identifier: Apache-2.0
r"""A small post-LN character transformer on real text, and the learning rate that kills it without warm-up.

Post-LN transformers need warm-up (Xiong et al., arXiv 2002.04745). Without it this one stays at the entropy of single
characters.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pydoc_data import topics

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pss_param.detector import Detector, Verdict

UNIGRAM = 3.2
"""About the entropy of single characters of the text, in nats: the loss of a dead run."""
RATE = 1e-2
"""A learning rate of AdamW at which the default size dies."""


@dataclass(frozen=True)
class Size:
    width: int = 32
    layers: int = 8
    heads: int = 4
    context: int = 32
    batch: int = 8


class Block(nn.Module):
    """Attention and MLP, each normalised after its residual sum."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.proj = nn.Linear(size.width, size.width)
        self.up = nn.Linear(size.width, 4 * size.width)
        self.down = nn.Linear(4 * size.width, size.width)
        self.norms = nn.ModuleList(nn.LayerNorm(size.width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = self.norms[0](x + self.proj(mixed.transpose(1, 2).flatten(2)))
        return self.norms[1](x + self.down(nn.functional.gelu(self.up(x))))


class TinyGPT(nn.Module):
    """Embeddings, blocks, head; ``recompute=True`` checkpoints every block's activations."""

    def __init__(self, size: Size = Size(), recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.token = nn.Embedding(len(alphabet()), size.width)
        self.place = nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.head = nn.Linear(size.width, len(alphabet()))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x)


class FiresAt(Detector):
    """Fires at given steps, whatever the gradients are."""

    def __init__(self, *steps: int) -> None:
        super().__init__()
        self.steps, self.count = steps, 0

    def judge(self, norm: float, seen: object) -> Verdict:
        self.count += 1
        return Verdict(True, None, 3.0, "asked to") if self.count in self.steps else Verdict(ratio=1.0)


@cache
def alphabet() -> str:
    """The characters of the text, in order."""
    return "".join(sorted(set(_text())))


@cache
def tokens() -> Tensor:
    """The text as indices into the alphabet."""
    index = {character: i for i, character in enumerate(alphabet())}
    return torch.tensor([index[character] for character in _text()])


def batch(step: int, size: Size = Size()) -> tuple[Tensor, Tensor]:
    """Inputs and targets of one step; the same for the same step."""
    generator = torch.Generator().manual_seed(1000 + step)
    starts = torch.randint(len(tokens()) - size.context - 1, (size.batch,), generator=generator)
    windows = torch.stack([tokens()[start : start + size.context + 1] for start in starts])
    return windows[:, :-1], windows[:, 1:]


def loss_of(model: nn.Module, step: int, size: Size = Size()) -> Tensor:
    """Cross entropy of one batch, in nats per character."""
    inputs, targets = batch(step, size)
    return nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def build(seed: int = 0, size: Size = Size(), recompute: bool = False) -> TinyGPT:
    """A model with its own seed."""
    torch.manual_seed(seed)
    return TinyGPT(size, recompute)


def mean_of_last(losses: list[float], count: int = 20) -> float:
    """The mean of the last losses."""
    return sum(losses[-count:]) / len(losses[-count:])


def _text() -> str:
    return "".join(topics.topics[name] for name in sorted(topics.topics))
