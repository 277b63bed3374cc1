# SPDX-License-Identifier: Apache-2.0
"""A training loop with everything in it: autocast, gradient scaler, accumulation, clipping, recomputation, a guard."""

from pydoc_data.topics import topics

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import pss_param as pss

CONTEXT, WIDTH, LAYERS, ACCUMULATE = 32, 32, 6, 2


class ByteTransformer(nn.Module):
    """Predicts the next byte; activations of the blocks are recomputed in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.position = nn.Parameter(torch.randn(CONTEXT, WIDTH) / 10)
        shape = (WIDTH, 4, 4 * WIDTH, 0.0, "gelu")
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(*shape, batch_first=True) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Compute the loss of a batch of windows ``(B, CONTEXT + 1)``."""
        x = self.embed(windows[:, :-1]) + self.position
        for block in self.blocks:
            x = checkpoint(block, x, self.mask, is_causal=True, use_reentrant=False)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1).float(), windows[:, 1:].flatten())


def main(guarded: bool = True, steps: int = 120, lr: float = 1e-2) -> float:
    """Train at a learning rate that kills the model without the guard.

    Returns:
        Mean loss of the last 20 steps, in nats per byte; 3.3 is that of knowing byte frequencies alone.
    """
    torch.manual_seed(0)
    data = torch.tensor(list("".join(topics.values()).encode())).unfold(0, CONTEXT + 1, CONTEXT)
    data = data[torch.randperm(len(data))]
    model = ByteTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # bfloat16 does not need one, float16 does
    guard = pss.attach(model)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        for batch in data[8 * step :][:8].chunk(ACCUMULATE):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(batch) / ACCUMULATE
            scaler.scale(loss).backward()
            losses.append(loss.item() * ACCUMULATE)
        scaler.unscale_(optimizer)  # the guard judges true gradients ...
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # ... by their norm before clipping
        if guarded:
            guard.step(norm)  # once per optimizer step, not once per backward
        scaler.step(optimizer)
        scaler.update()
    print(guard)
    return sum(losses[-20 * ACCUMULATE :]) / (20 * ACCUMULATE)


if __name__ == "__main__":
    print("without the guard:", main(guarded=False))
    print("with it:", main())
