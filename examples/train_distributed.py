# SPDX-License-Identifier: Apache-2.0
"""Guard a model on two CPU processes that it starts: the same two lines under DDP and FSDP2."""

import tempfile
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import pss_param as pss

CONTEXT, WIDTH, WORLD = 32, 32, 2


class ByteTransformer(nn.Module):
    """Predicts the next byte; normalises after every sublayer, which makes it fragile."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.position = nn.Parameter(torch.randn(CONTEXT, WIDTH) / 10)
        shape = (WIDTH, 4, 4 * WIDTH, 0.0, "gelu")
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(*shape, batch_first=True) for _ in range(6))
        self.head = nn.Linear(WIDTH, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)
        for parameter in (one for one in self.parameters() if one.dim() > 1):
            nn.init.normal_(parameter, std=0.02)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Compute the loss of a batch of windows ``(B, CONTEXT + 1)``."""
        x = self.embed(windows[:, :-1]) + self.position
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), windows[:, 1:].flatten())


def windows() -> torch.Tensor:
    """Pieces of Python's help texts in random order, the same on every rank."""
    data = torch.tensor(list("".join(topics.values()).encode())).unfold(0, CONTEXT + 1, CONTEXT)
    return data[torch.randperm(len(data), generator=torch.Generator().manual_seed(1))]


def train(rank: int, rendezvous: str, stack: str, guarded: bool, results: list[float], steps: int = 120) -> None:
    """Train one rank's share, at a learning rate that kills the model without the guard."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    model = ByteTransformer()
    for module in (*model.blocks, model) if stack == "fsdp" else ():
        fully_shard(module, mesh=init_device_mesh("cpu", (WORLD,)))
    wrapped = nn.parallel.DistributedDataParallel(model) if stack == "ddp" else model
    guard, data = pss.attach(model), windows()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad()
        loss = wrapped(data[(WORLD * step + rank) * 4 :][:4])
        loss.backward()
        if guarded:
            guard.step()  # every rank calls it; the norm is the global one, and all ranks decide alike
        optimizer.step()
        results[rank] += loss.item() / 20 * (step >= steps - 20)
    guard.detach()
    dist.destroy_process_group()


def main(stack: str = "fsdp", guarded: bool = True) -> float:
    """Train on two processes; returns the mean loss of the last 20 steps, 3.3 is that of byte frequencies."""
    with tempfile.TemporaryDirectory() as folder, mp.Manager() as manager:
        results = manager.list([0.0] * WORLD)
        mp.spawn(train, (f"{folder}/rendezvous", stack, guarded, results), nprocs=WORLD)
        return sum(results) / WORLD


if __name__ == "__main__":
    for choice in ("fsdp", "ddp"):
        print(f"{choice}: {main(choice, False):.2f} without the guard, {main(choice, True):.2f} with it")
