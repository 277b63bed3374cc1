# SPDX-License-Identifier: Apache-2.0
"""Moments of Lightning and distributed checkpoints are found by their own records and reset in place."""

import os

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from pss_param.errors import CheckpointError, NonFiniteError
from pss_param.options import RepairOptions
from pss_param.param_order import write_param_order
from pss_param.repair import repair_checkpoint
from pss_param.verification import verify_checkpoint

TARGET = "layers.1.up_proj.weight"
OPTIONS = {"edge": "init", "init_std": 0.01, "targets": "none", "include": (TARGET,)}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up_proj": nn.Linear(16, 24)}) for _ in range(3))
        self.norm = nn.BatchNorm1d(24)

    def forward(self, x):
        return sum(self.norm(layer["up_proj"](x)) for layer in self.layers)


def trained(groups=1, **options):
    net = Net()
    members = list(net.parameters())
    parts = [members] if groups == 1 else [members[:4], members[4:]]
    optimizer = torch.optim.AdamW([{"params": part} for part in parts], **options)
    net(torch.randn(4, 16)).square().mean().backward()
    optimizer.step()
    return net, optimizer


def lightning_file(net, optimizer, path):
    content = {
        "pytorch-lightning_version": "2.6.6",
        "state_dict": net.state_dict(), "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [], "epoch": 3, "global_step": 1,
    }  # fmt: skip
    torch.save(content, path)


def test_lightning_in_the_order_of_its_own_state_dict(tmp_path):
    net, optimizer = trained()
    lightning_file(net, optimizer, tmp_path / "x.ckpt")
    report = repair_checkpoint(tmp_path / "x.ckpt", options=RepairOptions(**OPTIONS, optimizer="reset"))
    assert report.optimizer.reset == (TARGET,)
    new = torch.load(report.output, weights_only=True)
    at = [name for name, _ in net.named_parameters()].index(TARGET)
    state = new["optimizer_states"][0]["state"]
    assert {n for n, entry in state.items() if not entry["exp_avg"].any() and entry["step"] == 0} == {at}
    assert new["global_step"] == 1
    assert not verify_checkpoint(report.output, tmp_path / "x.ckpt").problems


def test_two_groups_without_a_record_are_refused_and_with_names_are_not(tmp_path):
    net, optimizer = trained(groups=2)
    lightning_file(net, optimizer, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="param-order"):
        repair_checkpoint(tmp_path / "x.ckpt", options=RepairOptions(**OPTIONS, optimizer="reset"))
    named = torch.optim.AdamW(reversed(list(net.named_parameters())))
    net(torch.randn(4, 16)).square().mean().backward()
    named.step()
    lightning_file(net, named, tmp_path / "x.ckpt")
    report = repair_checkpoint(tmp_path / "x.ckpt", options=RepairOptions(**OPTIONS, optimizer="reset"), force=True)
    state = torch.load(report.output, weights_only=True)["optimizer_states"][0]["state"]
    at = [name for name, _ in reversed(list(net.named_parameters()))].index(TARGET)
    assert {n for n, entry in state.items() if entry["step"] == 0} == {at}


@pytest.mark.parametrize("mode", ["reset", "reset-all"])
def test_distributed_checkpoints_by_name(tmp_path, mode):
    net, optimizer = trained()
    state = {"model": net.state_dict(), "optim": get_optimizer_state_dict(net, optimizer)}
    dcp.save(state, checkpoint_id=tmp_path / "x", no_dist=True)
    options = RepairOptions(**{**OPTIONS, "include": (f"*{TARGET}",)}, optimizer=mode)
    report = repair_checkpoint(tmp_path / "x", options=options)
    assert len(report.changed) == 1
    fresh = {"model": net.state_dict(), "optim": get_optimizer_state_dict(net, optimizer)}
    dcp.load(fresh, checkpoint_id=report.output, no_dist=True)
    zero = {name for name, entry in fresh["optim"]["state"].items() if not entry["exp_avg"].any() and not entry["step"]}
    assert zero == ({TARGET} if mode == "reset" else set(dict(net.named_parameters())))
    assert sorted(os.listdir(tmp_path)) == ["x", "x-repaired", "x-repaired.pss.json"]
    assert not verify_checkpoint(report.output, tmp_path / "x").problems


def grown(**options):
    net, optimizer = trained(**options)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if name.endswith("up_proj.weight"):
                weight.mul_(9.0)
    return net, optimizer


def zeroed(report, net):
    state = torch.load(report.output, weights_only=True)["optimizer_states"][0]["state"]
    names = [name for name, _ in net.named_parameters()]
    return {names[n] for n, entry in state.items() if not entry["exp_avg"].any() and not entry["step"]}


@pytest.mark.parametrize(
    ("given", "mode"),
    [({}, "reset-all"), ({"strength": "gentle"}, "keep"), ({"strength": "deep", "optimizer": "keep"}, "keep")],
)
def test_a_deep_repair_begins_the_moments_anew_unless_told_otherwise(tmp_path, given, mode):
    net, optimizer = grown()
    lightning_file(net, optimizer, tmp_path / "x.ckpt")
    report = repair_checkpoint(tmp_path / "x.ckpt", options=RepairOptions(**given))
    assert (report.optimizer.mode, report.options["optimizer"]) == (mode, mode)
    assert zeroed(report, net) == (set(dict(net.named_parameters())) if mode == "reset-all" else set())
    assert not verify_checkpoint(report.output, tmp_path / "x.ckpt").problems


def test_moments_whose_beginning_nobody_knows_are_kept_and_that_is_told(tmp_path):
    net, optimizer = grown()
    for entry in optimizer.state.values():
        entry["preconditioner"] = torch.ones(2, 2)
    lightning_file(net, optimizer, tmp_path / "x.ckpt")
    report = repair_checkpoint(tmp_path / "x.ckpt")
    assert (report.options["strength"], report.optimizer.mode) == ("deep", "keep")
    assert "preconditioner" in report.reason
    assert zeroed(report, net) == set()
    with pytest.raises(CheckpointError, match="preconditioner"):
        repair_checkpoint(tmp_path / "x.ckpt", options=RepairOptions(optimizer="reset-all"), force=True)


def test_the_way_out_beside_master_copies_is_one_that_works(tmp_path):
    net, optimizer = grown()
    for weight, entry in optimizer.state.items():
        entry["master_param"] = weight.detach().clone()
    path = tmp_path / "x.pt"
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, path)
    for mode in ("auto", "keep", "reset", "reset-all"):
        with pytest.raises(CheckpointError, match="no reset helps") as caught:
            repair_checkpoint(path, options=RepairOptions(optimizer=mode))
        assert "reset-all" not in str(caught.value)
    write_param_order(net, optimizer, tmp_path / "order.json")
    report = repair_checkpoint(path, options=RepairOptions(param_order=tmp_path / "order.json"))
    assert len(report.optimizer.masters) == len(report.changed) + len(report.vectors)
    torch.save(torch.load(path, weights_only=True)["model"], tmp_path / "alone.pt")
    assert repair_checkpoint(tmp_path / "alone.pt").changed == report.changed


def test_masters_and_weights_are_still_one_after_a_deep_repair_of_what_has_grown_a_lot(tmp_path):
    torch.manual_seed(0)
    net, optimizer = trained()
    with torch.no_grad():
        for weight, entry in optimizer.state.items():
            weight.mul_(300)
            entry["master_param"] = weight.detach().clone()
    net = net.bfloat16()
    write_param_order(net, optimizer, tmp_path / "order.json")
    options = RepairOptions(strength="deep", param_order=tmp_path / "order.json")
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    assert repair_checkpoint(tmp_path / "x.pt", tmp_path / "y.pt", options).optimizer.masters
    after = torch.load(tmp_path / "y.pt", weights_only=True)
    masters = [entry["master_param"] for entry in after["optimizer"]["state"].values()]
    for (name, _), master in zip(net.named_parameters(), masters, strict=True):
        assert torch.equal(master.bfloat16(), after["model"][name])
        if name.endswith("up_proj.weight"):
            values = torch.linalg.svdvals(master)
            assert float(values[0]) < 1.001 * float(values[-1])
    repair_checkpoint(tmp_path / "y.pt", tmp_path / "z.pt", options)


def test_bad_moments_that_would_be_kept_are_refused_with_the_way_that_needs_no_names(tmp_path):
    net, optimizer = trained(groups=2)
    next(iter(optimizer.state.values()))["exp_avg"][0] = float("inf")
    lightning_file(net, optimizer, tmp_path / "x.ckpt")
    with pytest.raises(NonFiniteError, match=r"pass --optimizer reset-all \("):
        repair_checkpoint(tmp_path / "x.ckpt", options=RepairOptions(**OPTIONS, optimizer="keep"))
    assert repair_checkpoint(tmp_path / "x.ckpt", options=RepairOptions(**OPTIONS, optimizer="reset-all")).changed
