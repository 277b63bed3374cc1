# SPDX-License-Identifier: Apache-2.0
"""Hostile ``config.json`` files under ``--optimizer reset``: an order, or one sentence; no code, no hang, no flood."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pss_param import meta_model
from pss_param.errors import CheckpointError
from pss_param.options import RepairOptions
from pss_param.repair import repair_checkpoint

pytest.importorskip("transformers")

from fuzz_config import AUTO, CODE, MARKER, SEEDS

TESTS = Path(__file__).resolve().parent
SEED = os.environ.get("PSS_FUZZ_SEED", "1")


def child(*words, **environment):
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, env=environment, timeout=600
    )


def fuzz(first, step, count, seconds):
    """Outcomes of the cases, each with its seconds."""
    done = child(TESTS / "fuzz_config.py", SEED, first, step, count, seconds)
    assert done.returncode == 0, (done.stdout[-300:], done.stderr[-3000:])
    bad = re.findall(r"^(\d+ BAD .*?)^END$", done.stdout, re.MULTILINE | re.DOTALL)
    assert not bad, f"{len(bad)} cases break a rule, PSS_FUZZ_SEED={SEED}:\n\n" + "\n\n".join(bad[:5])
    found = re.findall(r"^\d+ (\w+): ([a-z ]+) ([\d.]+)$", done.stdout, re.MULTILINE)
    return [(seed, outcome) for seed, outcome, _ in found], done.stdout.splitlines()[-1]


def test_hostile_configurations_are_understood_or_refused():
    found, _ = fuzz(0, 1, 20, 3)
    outcomes = [outcome for _, outcome in found]
    assert outcomes.count("refused") >= 1
    assert len(found) < 20 or outcomes.count("done") >= 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thousand_hostile_configurations(record_property):
    start = time.monotonic()
    found, peak = fuzz(1000, 1, 3000, 240)
    table = {outcome: [o for _, o in found].count(outcome) for outcome in sorted({o for _, o in found})}
    print(f"\n{len(found)} cases in {time.monotonic() - start:.0f} s, {peak}: {table}")
    record_property("cases", len(found))
    assert len(found) >= 400
    assert {seed for seed, _ in found} == set(SEEDS)
    assert table["done"] > 0.05 * len(found)


@pytest.fixture
def trainer_folder(tmp_path):
    """A Trainer's folder whose optimizer numbers two parameters, and a module that must never be imported."""
    weights = {f"model.layers.{i}.mlp.up_proj.weight": torch.eye(8) + torch.ones(8, 8) for i in range(2)}
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.ones(8, 8), "exp_avg_sq": torch.ones(8, 8)}
    torch.save({"state": {0: moments, 1: moments}, "param_groups": [{"params": [0, 1]}]}, folder / "optimizer.pt")
    (folder / "trainer_state.json").write_text('{"global_step": 1}')
    (folder / "evil.py").write_text(CODE)
    return folder


# The whole way, with the process that the product starts.
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"auto_map": AUTO, "model_type": "evil", "trust_remote_code": True}, "no model type 'evil'"),
        pytest.param({"num_hidden_layers": 10**6}, "has more than", marks=pytest.mark.slow),
    ],
)
def test_a_repair_refuses_and_leaves_nothing(trainer_folder, change, words, monkeypatch):
    monkeypatch.chdir(trainer_folder)
    (trainer_folder / "config.json").write_text(json.dumps({**SEEDS["llama"], **change}))
    with pytest.raises(CheckpointError, match=words) as caught:
        repair_checkpoint(trainer_folder, options=RepairOptions(optimizer="reset"))
    assert str(trainer_folder) in str(caught.value)
    assert "--param-order" in str(caught.value)
    assert os.listdir(trainer_folder.parent) == [trainer_folder.name]
    assert not (trainer_folder / MARKER).exists()


def test_time_and_memory_have_limits(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(SEEDS["llama"]))
    monkeypatch.setattr(meta_model, "SECONDS", 0.05)
    with pytest.raises(CheckpointError, match=r"took more than 0\.05 seconds"):
        meta_model.trained_parameters(tmp_path, 20)
    (tmp_path / "config.json").write_bytes(b" " * (meta_model.MAX_CONFIG + 1))
    with pytest.raises(CheckpointError, match="10,000,001 bytes"):
        meta_model.trained_parameters(tmp_path, 20)


def test_what_is_not_to_be_followed_is_taken_out_at_every_depth(tmp_path):
    model = {"architectures": ["X"], "model_type": "x"}
    content = {"a": [{"auto_map": AUTO, "b": 1}], "auto_map": AUTO, "text_config": {"_attn_implementation": "x/y"}}
    content |= model
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert json.loads(meta_model.read_config(tmp_path / "config.json")) == {"a": [{"b": 1}], "text_config": {}, **model}


@pytest.mark.slow
def test_the_lure_would_run_if_it_were_trusted(trainer_folder):
    # Else the cases above would prove nothing.
    content = {**SEEDS["llama"], "model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (trainer_folder / "config.json").write_text(json.dumps(content))
    program = (
        "import os, sys, transformers\nos.chdir(sys.argv[1])\n"
        "transformers.AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
    )
    child("-c", program, trainer_folder, HF_MODULES_CACHE=str(trainer_folder / "cache"), HF_HUB_OFFLINE="1")
    assert (trainer_folder / MARKER).exists()
