# SPDX-License-Identifier: Apache-2.0
"""The networks, small enough for a CPU, with PyTorch's default initialisers and nothing that would steady them.

Each has ``loss(batch)``, the mean cross-entropy in nats. The matrices that methods act on are inside ``layers``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import SelfAttention
from .data import Batch

CLASSES = 10
SIDE = 8
"""Pixels along an image."""


class Classifier(nn.Module):
    """A network whose last dimension is logits."""

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy of the targets, in nats."""
        inputs, targets = batch
        return F.cross_entropy(self(inputs).flatten(0, -2), targets.flatten())


def waves(context: int, width: int) -> Tensor:
    """Sines and cosines of the position, ``(context, width)``, in wavelengths from 6.3 to 63,000 positions."""
    angles = torch.arange(context)[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


@dataclass(frozen=True)
class Shape:
    """Size and kind of a transformer.

    Args:
        width: size of the residual stream.
        layers: number of blocks.
        heads: attention heads per block.
        post_norm: normalize after each sum (Vaswani et al. 2017) instead of before each branch.
        causal: no position sees a later one.
        bias: in linear layers and norms; nanoGPT's recipe has none.
        table_std: of the entries of the tables of symbols and positions at the start; PyTorch's is 1, GPT-2's 0.02.
        waves: the positions' table starts as the sines and cosines of Vaswani et al. (2017) instead.
    """

    width: int
    layers: int
    heads: int
    post_norm: bool = False
    causal: bool = True
    bias: bool = True
    table_std: float = 1.0
    waves: bool = False

    def linear(self, inputs: int, outputs: int) -> nn.Linear:
        """A linear layer of this kind, both sizes as multiples of the width."""
        return nn.Linear(inputs * self.width, outputs * self.width, bias=self.bias)

    def norm(self) -> nn.LayerNorm:
        """A norm of this kind."""
        return nn.LayerNorm(self.width, bias=self.bias)

    def tables(self, symbols: int, context: int) -> tuple[nn.Embedding, nn.Embedding]:
        """Tables of symbols and positions of this kind; both are trained."""
        found = nn.Embedding(symbols, self.width), nn.Embedding(context, self.width)
        for table in found:
            nn.init.normal_(table.weight, std=self.table_std)
        if self.waves:
            with torch.no_grad():
                found[1].weight.copy_(waves(context, self.width))
        return found


class Block(nn.Module):
    """Attention and a perceptron of four times the width.

    Args:
        shape: of the transformer.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.post_norm = shape.post_norm
        self.attention = SelfAttention(shape.width, shape.heads, shape.causal, shape.bias)
        self.up_proj, self.down_proj = shape.linear(1, 4), shape.linear(4, 1)
        self.attention_norm, self.mlp_norm = shape.norm(), shape.norm()

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block; the shape stays ``(batch, context, width)``."""
        if self.post_norm:
            x = self.attention_norm(x + self.attention(x))
            return self.mlp_norm(x + self._mlp(x))
        x = x + self.attention(self.attention_norm(x))
        return x + self._mlp(self.mlp_norm(x))

    def _mlp(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


def trunk(shape: Shape) -> tuple[nn.ModuleList, nn.Module]:
    """Blocks, and what follows them: pre-LN networks normalize once more at the end."""
    blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
    return blocks, nn.Identity() if shape.post_norm else shape.norm()


class TextTransformer(Classifier):
    """A GPT, or without the causal mask a BERT, over characters.

    Args:
        inputs: number of input symbols.
        outputs: number of symbols to predict.
        context: longest input.
        shape: of the blocks.
    """

    def __init__(self, inputs: int, outputs: int, context: int, shape: Shape) -> None:
        super().__init__()
        self.character_embedding, self.position_embedding = shape.tables(inputs, context)
        self.layers, self.norm = trunk(shape)
        self.head = nn.Linear(shape.width, outputs)

    def forward(self, text: Tensor) -> Tensor:
        """Logits ``(batch, context, outputs)`` of symbols ``(batch, context)``."""
        x = self.character_embedding(text) + self.position_embedding.weight[: text.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class VisionTransformer(Classifier):
    """A ViT over square patches, which averages their features at the end (Zhai et al., arXiv 2106.04560).

    Args:
        patch: pixels along a patch.
        shape: of the blocks.
    """

    def __init__(self, patch: int, shape: Shape) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, shape.width, patch, stride=patch)
        self.position_embedding = nn.Embedding((SIDE // patch) ** 2, shape.width)
        self.layers, self.norm = trunk(shape)
        self.head = nn.Linear(shape.width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, 10)`` of images ``(batch, 1, 8, 8)``."""
        x = self.patches(images).flatten(2).mT + self.position_embedding.weight
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(dim=1))


class Residual(nn.Module):
    """Two normalized 3 x 3 convolutions around an identity (He et al., arXiv 1512.03385).

    Args:
        channels: in and out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block; the shape stays ``(batch, channels, height, width)``."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(y)))


class ResNet(Classifier):
    """A small residual convolutional network.

    Args:
        channels: of every layer.
        layers: number of residual blocks of two convolutions.
    """

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1, stride=2)
        self.layers = nn.ModuleList(Residual(channels) for _ in range(layers))
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, 10)`` of images ``(batch, 1, 8, 8)``."""
        x = F.relu(self.stem(images))
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(dim=(2, 3)))


class Dense(nn.Module):
    """One layer of the perceptron: ``norm(x + relu(W x))``.

    Args:
        width: in and out.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer; the shape stays ``(batch, width)``."""
        return self.norm(x + F.relu(self.linear(x)))


class Perceptron(Classifier):
    """A deep perceptron that normalizes after each sum.

    Args:
        width: of the hidden layers.
        layers: number of them.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.stem = nn.Linear(SIDE * SIDE, width)
        self.layers = nn.ModuleList(Dense(width) for _ in range(layers))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, 10)`` of images ``(batch, 1, 8, 8)``."""
        x = self.stem(images.flatten(1))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Recurrent(nn.LSTM):
    """One LSTM layer, whose two matrices are drawn as those of linear layers are.

    Args:
        inputs: features per step.
        width: of state and output.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__(inputs, width, batch_first=True)

    def reset_parameters(self) -> None:
        """Draw each matrix and its bias in turn; with inputs as wide as the state that is PyTorch's distribution."""
        for side in ("ih", "hh"):
            weight, bias = (getattr(self, f"{kind}_{side}_l0") for kind in ("weight", "bias"))
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            nn.init.uniform_(bias, -1 / math.sqrt(weight.shape[1]), 1 / math.sqrt(weight.shape[1]))


class CharacterLSTM(Classifier):
    """A stack of LSTM layers over characters.

    Args:
        symbols: number of characters.
        width: of embedding and layers.
        layers: number of layers.
    """

    def __init__(self, symbols: int, width: int, layers: int) -> None:
        super().__init__()
        self.character_embedding = nn.Embedding(symbols, width)
        self.layers = nn.ModuleList(Recurrent(width, width) for _ in range(layers))
        self.head = nn.Linear(width, symbols)

    def forward(self, text: Tensor) -> Tensor:
        """Logits ``(batch, context, symbols)`` of characters ``(batch, context)``."""
        x = self.character_embedding(text)
        for layer in self.layers:
            x, _ = layer(x)
        return self.head(x)
