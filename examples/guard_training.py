# SPDX-License-Identifier: Apache-2.0
"""Guard a training loop: two lines, plus two to resume exactly."""

import torch
from torch import nn

import pss_param as pss


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A small regression task; batch 60 has a corrupted scale, as real data sometimes has."""
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
    y = torch.sin(x[:, :4].sum(1, keepdim=True))
    return (x * 30 if step == 60 else x), y


def main(steps: int = 120) -> int:
    """Train, and report what the guard saw.

    Returns:
        How often the guard smoothed.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    guard = pss.attach(model)

    for step in range(steps):
        optimizer.zero_grad()
        x, y = batch(step)
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # returns the norm before clipping
        event = guard.step(norm)
        if event.triggered:
            print(event)
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.4f}")

    # A checkpoint is the model's own, with plain names, and the guard's beside it.
    checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "guard": guard.state_dict()}
    model.load_state_dict(checkpoint["model"])
    guard.load_state_dict(checkpoint["guard"])

    guard.detach()
    print(guard)
    return guard.triggers


if __name__ == "__main__":
    main()
