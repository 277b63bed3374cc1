# SPDX-License-Identifier: Apache-2.0
"""Guard a model that is spread two ways: tensor parallel inside of a layer, FSDP2 over the batch; compiled if you like.

It starts its own four CPU processes. The network and the data are those of train_distributed.py.
"""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from train_distributed import ByteTransformer, windows

import pss_param as pss

WORLD = 4


def train(rank: int, rendezvous: str, guarded: bool, compiled: bool, results: list[float], steps: int = 120) -> None:
    """Train one rank's share, at a learning rate that kills the model without the guard."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, mesh = ByteTransformer(), init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for block in model.blocks:
        parallelize_module(block, mesh["tensor"], {"linear1": ColwiseParallel(), "linear2": RowwiseParallel()})
        if compiled:
            block.compile()
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    guard = pss.attach(model)  # all matrices inside of the blocks, however they are cut
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, foreach=False)
    share, data = mesh["data"].get_local_rank(), windows()
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(data[(2 * step + share) * 4 :][:4])
        loss.backward()
        if guarded:
            guard.step()  # every rank calls it; the norm is the global one, and all ranks decide alike
        optimizer.step()
        results[rank] += loss.item() / 20 * (step >= steps - 20)
    guard.detach()
    dist.destroy_process_group()


def main(guarded: bool = True, compiled: bool = False) -> float:
    """Train on four processes; returns the mean loss of the last 20 steps, 3.3 is that of byte frequencies."""
    with tempfile.TemporaryDirectory() as folder, mp.Manager() as manager:
        results = manager.list([0.0] * WORLD)
        mp.spawn(train, (f"{folder}/rendezvous", guarded, compiled, results), nprocs=WORLD)
        return sum(results) / WORLD


if __name__ == "__main__":
    print(f"{main(False):.2f} without the guard, {main(True):.2f} with it")
