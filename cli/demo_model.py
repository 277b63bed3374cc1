# SPDX-License-Identifier: Apache-2.0
r"""The network of the demo: a character transformer that normalizes after each sum (post-LN), as in 2017.

Post-LN networks die at learning rates that pre-LN networks survive, which is what the demo needs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pss_param.spectrum import stable_rank


class Block(nn.Module):
    r"""Attention and a two-layer perceptron, each followed by a sum and a normalization.

    Args:
        width: size of the residual stream.
        heads: number of attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        r"""See the class."""
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))
        self.up_proj, self.down_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        r"""Compute the block.

        Args:
            x: ``(batch, context, width)``.

        Returns:
            The same shape.
        """
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = self.attention_norm(x + self.o_proj(seen))
        y: Tensor = self.mlp_norm(x + self.down_proj(F.gelu(self.up_proj(x))))
        return y


class CharacterTransformer(nn.Module):
    r"""Predicts the next character.

    Args:
        characters: size of the alphabet.
        width: size of the residual stream.
        layers: number of blocks.
        heads: attention heads per block.
        context: longest input.
    """

    def __init__(self, characters: int, width: int, layers: int, heads: int, context: int) -> None:
        r"""See the class."""
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Embedding(context, width)
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.lm_head = nn.Linear(width, characters)

    def forward(self, text: Tensor) -> Tensor:
        r"""Compute the logits.

        Args:
            text: ``(batch, context)`` character numbers.

        Returns:
            ``(batch, context, characters)``.
        """
        x = self.characters(text) + self.positions.weight[: text.shape[1]]
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.lm_head(x)
        return logits

    def loss(self, text: Tensor, following: Tensor) -> Tensor:
        r"""Compute the mean cross-entropy.

        Args:
            text: ``(batch, context)`` character numbers.
            following: for each of them the character that comes next.

        Returns:
            A scalar, in nats per character.
        """
        return F.cross_entropy(self(text).flatten(0, 1), following.flatten())

    @torch.no_grad()
    def stable_rank(self) -> float:
        r"""Look at the matrices inside the blocks.

        Returns:
            The median of their stable ranks, dimensionless.
        """
        weights = (p for name, p in self.layers.named_parameters() if name.endswith("_proj.weight"))
        return float(torch.stack([stable_rank(weight) for weight in weights]).median())
