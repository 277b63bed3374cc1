# SPDX-License-Identifier: Apache-2.0
"""Guard a loop of your own under accelerate: three lines (attach, register, step).

Needs ``pip install "pss-param[hf]"``; downloads nothing.
"""

from pydoc_data.topics import topics

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

import pss_param as pss

CONTEXT, WIDTH, LAYERS = 32, 32, 6


class ByteTransformer(nn.Module):
    """Predicts the next byte; normalises after every sublayer, which makes it fragile."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.position = nn.Parameter(torch.randn(CONTEXT, WIDTH) / 10)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS)
        self.head = nn.Linear(WIDTH, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Compute the loss of a batch of windows ``(B, CONTEXT + 1)``."""
        x = self.layers(self.embed(windows[:, :-1]) + self.position, mask=self.mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), windows[:, 1:].flatten())


def main(guarded: bool = True, steps: int = 120, lr: float = 1e-2, accumulation: int = 1) -> float:
    """Train at a learning rate that kills the model without the guard.

    Returns:
        Mean loss of the last 20 batches, in nats per byte; 3.3 is that of knowing byte frequencies alone.
    """
    set_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    data = torch.tensor(list("".join(topics.values()).encode())).unfold(0, CONTEXT + 1, CONTEXT)
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    model = ByteTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if guarded:
        guard = pss.attach(model)
        accelerator.register_for_checkpointing(guard)  # save_state() and load_state() take the guard along

    losses = []
    for batch, _ in zip(loader, range(steps * accumulation), strict=False):
        with accelerator.accumulate(model):
            loss = model(batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:  # once per optimizer step, with the norm before clipping
                norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
                if guarded:
                    guard.step(norm)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    if guarded:
        guard.detach()
        print(guard)
    return sum(losses[-20:]) / 20


if __name__ == "__main__":
    print("without the guard:", main(guarded=False))
    print("with it:", main())
