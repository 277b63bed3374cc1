# SPDX-License-Identifier: Apache-2.0
"""Guard a training loop: two lines, plus two to resume exactly. The same lines serve under torch.compile."""

import sys
from pydoc_data.topics import topics

import torch
from torch import nn

import pss_param as pss

CONTEXT, WIDTH, LAYERS = 32, 32, 6


class ByteTransformer(nn.Module):
    """Predicts the next byte; normalises after every sublayer, which makes it fragile."""

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
            x = block(x, src_mask=self.mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), windows[:, 1:].flatten())


def main(guarded: bool = True, compiled: bool = False, steps: int = 120, lr: float = 1e-2) -> float:
    """Train at a learning rate that kills the model without the guard.

    Returns:
        Mean loss of the last 20 steps, in nats per byte; 3.3 is that of knowing byte frequencies alone.
    """
    torch.manual_seed(0)
    data = torch.tensor(list("".join(topics.values()).encode())).unfold(0, CONTEXT + 1, CONTEXT)
    data = data[torch.randperm(len(data))]
    model = ByteTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    guard = pss.attach(model)
    loss_of = torch.compile(model, fullgraph=True) if compiled else model

    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(data[8 * step :][:8])
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # returns the norm before clipping
        if guarded:
            guard.step(norm)
        optimizer.step()
        losses.append(loss.item())

    # A checkpoint is the model's own, with plain names, and the guard's beside it.
    checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "guard": guard.state_dict()}
    model.load_state_dict(checkpoint["model"])
    guard.load_state_dict(checkpoint["guard"])
    guard.detach()
    print(guard)
    return sum(losses[-20:]) / 20


if __name__ == "__main__":
    print("without the guard:", main(guarded=False))
    print("with it:", main(compiled="--compile" in sys.argv))
