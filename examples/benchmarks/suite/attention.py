# SPDX-License-Identifier: Apache-2.0
"""Multi-head self-attention with the two things that methods ask of it: a switch for qk-norm, and the largest logit."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    r"""Multi-head self-attention over ``(batch, context, width)``.

    Set ``qk_norm`` before training for a parameter-free RMS norm of queries and keys in every head (Henry et al.,
    arXiv 2010.04245, without the learned scale). Set ``record`` to keep, of each forward pass, the largest logit of
    every head in ``max_logit``, ``(heads,)``:

    .. math:: \max_{b, i, j} q_{b,i} \cdot k_{b,j} / \sqrt{d_\text{head}}

    over the pairs that attend to each other.

    Args:
        width: size of the residual stream.
        heads: number of heads; divides ``width``.
        causal: no position sees a later one.
        bias: in the four linear layers.
    """

    qk_norm: bool = False
    record: bool = False
    max_logit: Tensor | None = None

    def __init__(self, width: int, heads: int, causal: bool, bias: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=bias) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Mix the positions; the shape stays ``(batch, context, width)``."""
        q, k, v = (self._split(layer(x)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            q, k = F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])
        if self.record:
            self.max_logit = self._largest(q, k)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    @torch.no_grad()
    def _largest(self, q: Tensor, k: Tensor) -> Tensor:
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        if self.causal:
            later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
            logits = logits.masked_fill(later, -math.inf)
        return logits.amax(dim=(0, 2, 3))
