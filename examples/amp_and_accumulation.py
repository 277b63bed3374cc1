# SPDX-License-Identifier: Apache-2.0
"""A training loop with everything in it: autocast, gradient scaler, accumulation, clipping, recomputation, a guard."""

from pydoc_data import topics

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import pss_param as pss

WIDTH, CONTEXT, ACCUMULATE = 32, 32, 2
TEXT = torch.tensor(list("".join(topics.topics[name] for name in sorted(topics.topics)).encode("ascii", "ignore")))


class Model(nn.Module):
    """Predicts the next character; activations of the blocks are recomputed in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, WIDTH)
        self.place = nn.Parameter(torch.randn(CONTEXT, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 8).layers
        self.head = nn.Linear(WIDTH, 128)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the characters that follow."""
        x = self.embed(tokens) + self.place
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        for block in self.blocks:
            x = checkpoint(block, x, mask, is_causal=True, use_reentrant=False)
        return self.head(x)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    """Cross entropy in nats per character; 3.2 is what single characters give."""
    starts = torch.randint(len(TEXT) - CONTEXT - 1, (4,), generator=torch.Generator().manual_seed(step))
    windows = torch.stack([TEXT[start : start + CONTEXT + 1] for start in starts])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(windows[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def main(steps: int = 60, rate: float = 1e-3) -> float:
    """Train.

    Returns:
        The mean loss of the last twenty steps.
    """
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # bfloat16 does not need one, float16 does
    guard = pss.attach(model)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(ACCUMULATE):
            loss = loss_of(model, step * ACCUMULATE + part) / ACCUMULATE
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)  # the guard judges true gradients ...
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # ... by their norm before clipping
        event = guard.step(grad_norm=norm)  # once per optimizer step, not once per backward
        if event.triggered or event.skip:
            print(event)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item() * ACCUMULATE)
    mean = sum(losses[-20:]) / len(losses[-20:])
    print(f"loss {mean:.2f}, {guard}")
    return mean


if __name__ == "__main__":
    main()
