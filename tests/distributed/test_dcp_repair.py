# SPDX-License-Identifier: Apache-2.0
"""A distributed checkpoint of two ranks: repaired by one process, loaded back by both."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch_files import TinyTransformer, check_slices, make_sick

from pss_param.checkpoint import open_checkpoint
from pss_param.options import RepairOptions
from pss_param.repair import repair_checkpoint

UP = "layers.0.mlp.up_proj.weight"


def sharded():
    """Rows that two ranks cannot share evenly are among the weights: 30 * 3 and 45 of them."""
    torch.manual_seed(0)
    model = make_sick(TinyTransformer(width=30, words=45))
    mesh = dist.init_device_mesh("cpu", (2,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.arange(8)[None]).logsumexp(-1).sum().backward()
    optimizer.step()
    return model, optimizer


def save(path):
    weights, moments = get_state_dict(*sharded())
    dcp.save({"app": {"model": weights, "optim": moments}, "step": torch.tensor(7)}, checkpoint_id=path)


def load(path):
    model, optimizer = sharded()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    weights, moments = get_state_dict(model, optimizer)
    state = {"app": {"model": weights, "optim": moments}, "step": torch.tensor(0)}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    full = {name: weight.full_tensor() for name, weight in model.state_dict().items()}
    return full, moments["state"][UP]["exp_avg"].full_tensor(), state["step"]


def test_two_ranks_save_and_load_the_repair(two_ranks, tmp_path):
    path, output = Path(tmp_path, "step-7"), Path(tmp_path, "step-7-repaired")
    two_ranks(save, path)
    report = repair_checkpoint(path, options=RepairOptions(strength="gentle"))
    name = f"app.model.{UP}"
    assert name in report.changed
    old, new = check_slices(path), check_slices(output)
    assert {name for name, origin in old if old[name, origin] != new[name, origin]} == set(report.changed)
    answers = two_ranks(load, output)
    with open_checkpoint(output) as layout:
        assert len({chunk.file for chunk in layout.tensors[name].chunks}) == 2
        for full, exp_avg, step in answers:
            for key, value in full.items():
                assert torch.equal(layout.read(f"app.model.{key}"), value), key
            assert torch.equal(layout.read(layout.moments[name]["exp_avg"]), exp_avg)
            assert step == 7
