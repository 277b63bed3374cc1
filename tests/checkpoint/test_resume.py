# SPDX-License-Identifier: Apache-2.0
"""Training goes on from repaired folders: same step, scheduler and random state; optimizer kept or reset."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pss_param.errors import CheckpointError, NonFiniteError
from pss_param.options import RepairOptions
from pss_param.param_order import read_param_order, write_param_order
from pss_param.repair import repair_checkpoint

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

STRONG = {"edge": "init", "init_std": 0.01}


def model():
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=True, attention_bias=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def trainer(folder):
    source = torch.Generator().manual_seed(2)
    rows = [torch.randint(0, 32, (8,), generator=source) for _ in range(12)]
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        logging_steps=1, learning_rate=1e-3, weight_decay=0.1, disable_tqdm=True, optim="adamw_torch",
    )  # fmt: skip
    return transformers.Trainer(model(), args, train_dataset=[{"input_ids": row, "labels": row} for row in rows])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer(folder).train()
    return folder


@pytest.fixture
def checkpoint(run, tmp_path):
    shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    return tmp_path / "checkpoint-2"


def moments(folder, file="optimizer.pt"):
    return torch.load(os.path.join(folder, file), weights_only=True)


def test_a_trainer_resumes_with_step_scheduler_and_random_state(run, checkpoint, tmp_path):
    report = repair_checkpoint(checkpoint, options=RepairOptions(**STRONG))
    assert report.format == "transformers Trainer folder (safetensors)"
    assert len(report.changed) == 14
    for name in set(os.listdir(checkpoint)) - {"model.safetensors"}:
        assert (checkpoint / name).read_bytes() == Path(report.output, name).read_bytes(), name
    going_on = trainer(tmp_path / "more")
    going_on.train(resume_from_checkpoint=report.output)
    control = json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    resumed = json.loads((tmp_path / "more" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert [(row["step"], row["learning_rate"]) for row in resumed] == [
        (row["step"], row["learning_rate"]) for row in control
    ]
    assert going_on.state.global_step == 4
    first = "rng_state.pth"
    old, new = (torch.load(where / "checkpoint-4" / first, weights_only=False) for where in (run, tmp_path / "more"))
    assert torch.equal(old["cpu"], new["cpu"])
    assert float(moments(tmp_path / "more" / "checkpoint-4")["state"][0]["step"]) == 4


@pytest.mark.parametrize("mode", ["reset", "reset-all"])
def test_resetting_moments_writes_zeros_for_the_right_parameters(checkpoint, tmp_path, mode):
    target = "model.layers.1.mlp.up_proj.weight"
    options = RepairOptions(**STRONG, targets="none", include=(target,), optimizer=mode)
    report = repair_checkpoint(checkpoint, options=options)
    assert report.changed == (target,)
    old, new = moments(checkpoint)["state"], moments(report.output)["state"]
    reset = {number for number, state in new.items() if not any(bool(value.any()) for value in state.values())}
    assert all(state["exp_avg"].any() and state["step"] == 2 for state in old.values())
    if mode == "reset-all":
        assert reset == set(old)
    else:
        # Oracle: the live optimizer of an equal trainer.
        live = trainer(tmp_path / "live")
        live.create_optimizer()
        order = [p for group in live.optimizer.param_groups for p in group["params"]]
        assert reset == {next(i for i, p in enumerate(order) if p is live.model.get_parameter(target))}
        assert report.optimizer.reset == (target,)
        assert report.optimizer.order.endswith("config.json")
    for number in set(old) - reset:
        assert all(torch.equal(old[number][name], new[number][name]) for name in old[number])
    assert moments(report.output)["param_groups"] == moments(checkpoint)["param_groups"]
    going_on = trainer(tmp_path / "more")
    going_on.train(resume_from_checkpoint=report.output)
    assert going_on.state.global_step == 4


def test_an_order_that_does_not_fit_is_refused(checkpoint, tmp_path):
    other = model()
    order = tmp_path / "order.json"
    write_param_order(other, torch.optim.AdamW(reversed(list(other.parameters()))), order)
    with pytest.raises(CheckpointError, match="has the shape"):
        repair_checkpoint(checkpoint, options=RepairOptions(optimizer="reset", param_order=order))
    write_param_order(other, torch.optim.AdamW([other.model.norm.weight]), order, force=True)
    with pytest.raises(CheckpointError, match="has 1"):
        repair_checkpoint(checkpoint, options=RepairOptions(optimizer="reset", param_order=order))
    config = json.loads((checkpoint / "config.json").read_text())
    for change in ({"num_hidden_layers": 3}, {"architectures": ["Nonsense"]}):
        (checkpoint / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match="param-order"):
            repair_checkpoint(checkpoint, options=RepairOptions(optimizer="reset"))
    (checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointError, match="param-order"):
        repair_checkpoint(checkpoint, options=RepairOptions(optimizer="reset"))
    order.write_text('{"schema": "other"}')
    with pytest.raises(CheckpointError, match="write_param_order"):
        read_param_order(order)


def spoil(folder, number, value=float("nan")):
    state = moments(folder)
    state["state"][number]["exp_avg"].view(-1)[3] = value
    torch.save(state, folder / "optimizer.pt")


def test_moments_that_are_not_finite_are_refused_unless_reset(checkpoint):
    spoil(checkpoint, 1)
    with pytest.raises(NonFiniteError, match=r"optimizer.pt:state.1.exp_avg \(1\)"):
        repair_checkpoint(checkpoint)
    report = repair_checkpoint(checkpoint, options=RepairOptions(optimizer="reset-all"))
    assert all(state["exp_avg"].isfinite().all() for state in moments(report.output)["state"].values())
    spoil(checkpoint, 15)  # the second group: a norm, which is no target
    with pytest.raises(NonFiniteError, match="reset-all"):
        repair_checkpoint(checkpoint, options=RepairOptions(optimizer="reset"), force=True)


def test_states_that_cannot_be_reset_in_place_are_refused(checkpoint):
    original = moments(checkpoint)
    for change, reason in ((("step", 2), "number inside a pickle"), (("shampoo", torch.ones(3)), "initial state of")):
        state = {**original, "state": {n: {**s, change[0]: change[1]} for n, s in original["state"].items()}}
        torch.save(state, checkpoint / "optimizer.pt")
        with pytest.raises(CheckpointError, match=reason):
            repair_checkpoint(checkpoint, options=RepairOptions(optimizer="reset-all"))
    (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match="no optimizer state"):
        repair_checkpoint(checkpoint, options=RepairOptions(optimizer="reset"))


def with_masters(checkpoint, scale=1.0):
    """The weights in bfloat16 and their float32 originals inside the optimizer, as Transformer Engine has them."""
    live = trainer(checkpoint.parent / "live")
    live.create_optimizer()
    weights = load_file(checkpoint / "model.safetensors")
    names = {id(p): name for name, p in live.model.named_parameters()}
    state = moments(checkpoint)
    for number, p in enumerate(p for group in live.optimizer.param_groups for p in group["params"]):
        state["state"][number]["master_param"] = weights[names[id(p)]].clone() * scale
    torch.save(state, checkpoint / "optimizer.pt")
    save_file({name: w.bfloat16() for name, w in weights.items()}, checkpoint / "model.safetensors", {"format": "pt"})
    return [names[id(p)] for group in live.optimizer.param_groups for p in group["params"]]


def test_master_weights_get_the_same_correction(checkpoint):
    names = with_masters(checkpoint)
    before = moments(checkpoint)["state"]
    report = repair_checkpoint(checkpoint, options=RepairOptions(**STRONG))
    weights, masters = load_file(os.path.join(report.output, "model.safetensors")), moments(report.output)["state"]
    assert len(report.optimizer.masters) == len(report.changed) == 14
    for number, name in enumerate(names):
        master = masters[number]["master_param"]
        assert master.dtype == torch.float32
        assert torch.equal(master, before[number]["master_param"]) == (name not in report.changed)
        if name in weights:
            assert (master - weights[name].float()).norm() < 0.01 * master.norm()


def test_masters_that_are_something_else_are_refused(checkpoint):
    with_masters(checkpoint, scale=3.0)
    with pytest.raises(CheckpointError, match="not equal to it"):
        repair_checkpoint(checkpoint)
    state = {**moments(checkpoint), "state": {0: {"exp_avg": torch.ones(2)}}, "fp32_groups": [torch.ones(9)]}
    torch.save(state, checkpoint / "optimizer.pt")
    with pytest.raises(CheckpointError, match="master copies"):
        repair_checkpoint(checkpoint)


@pytest.mark.parametrize("safe", [True, False])
def test_accelerate_goes_on_from_the_repaired_state(tmp_path, safe):
    def prepared():
        accelerator = accelerate.Accelerator(cpu=True)
        net = model()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return accelerator, net, *accelerator.prepare(net, optimizer, schedule)

    def step(wrapped, optimizer, schedule):
        batch = torch.randint(0, 32, (2, 8))
        wrapped(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return batch

    accelerator, net, wrapped, optimizer, schedule = prepared()
    for _ in range(3):
        step(wrapped, optimizer, schedule)
    accelerator.save_state(tmp_path / "state", safe_serialization=safe)
    write_param_order(net, optimizer.optimizer, tmp_path / "order.json")
    drawn = step(wrapped, optimizer, schedule)
    options = RepairOptions(**STRONG, optimizer="reset", param_order=tmp_path / "order.json")
    report = repair_checkpoint(tmp_path / "state", options=options)
    assert report.format.startswith("accelerate folder")
    assert len(report.optimizer.reset) == len(report.changed) == 14
    accelerator, net, wrapped, optimizer, schedule = prepared()
    accelerator.load_state(report.output)
    assert schedule.get_last_lr() == [1e-2 * 0.5**3]
    assert torch.equal(torch.randint(0, 32, (2, 8)), drawn)
    state = {name: optimizer.optimizer.state[p] for name, p in net.named_parameters()}
    assert {name for name, entry in state.items() if entry["step"] == 0} == set(report.changed)
    step(wrapped, optimizer, schedule)
