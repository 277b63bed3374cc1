# SPDX-License-Identifier: Apache-2.0
"""Save a guarded FSDP2 run with torch.distributed.checkpoint, and go on from it on another number of processes.

Model and optimizer are saved as those of any run, so a run without a guard can load them; the guard goes beside them.
"""

import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from train_distributed import ByteTransformer, windows

import pss_param as pss

BATCH, SAVED = 8, 20


def train(rank: int, world: int, folder: str, steps: range, losses: dict[tuple[int, int], float]) -> None:
    """Train one rank's share of some steps; save after step 20, load when the steps begin there."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/{steps}", rank=rank, world_size=world)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = ByteTransformer()
    for module in (*model.blocks, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (world,)))
    guard = pss.attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    share, data = BATCH // world, windows()
    if steps.start == SAVED:
        weights, moments = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": moments, "guard": guard}, checkpoint_id=f"{folder}/saved")
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    for step in steps:
        optimizer.zero_grad()
        loss = model(data[BATCH * step + share * rank :][:share])
        loss.backward()
        guard.step()
        optimizer.step()
        losses[rank, step] = loss.item()
        if step + 1 == SAVED:
            weights, moments = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": moments, "guard": guard}, checkpoint_id=f"{folder}/saved")
    dist.destroy_process_group()


def main(steps: int = 26) -> tuple[list[float], list[float]]:
    """Train on one process, then go on from its checkpoint on two; returns the losses of both."""
    with tempfile.TemporaryDirectory() as folder, mp.Manager() as manager:
        one, two = manager.dict(), manager.dict()
        mp.spawn(train, (1, folder, range(steps), one), nprocs=1)
        mp.spawn(train, (2, folder, range(SAVED, steps), two), nprocs=2)
        later = range(SAVED, steps)
        return [one[0, step] for step in later], [(two[0, step] + two[1, step]) / 2 for step in later]


if __name__ == "__main__":
    for step, (before, after) in enumerate(zip(*main(), strict=True), SAVED):
        print(f"step {step}: {before:.4f} uninterrupted on one process, {after:.4f} resumed on two")
