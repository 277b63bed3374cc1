# SPDX-License-Identifier: Apache-2.0
import importlib
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from scripted import UNIGRAM, OnSteps, example, same
from torch.nn.utils import parametrize

from pss_param import AnyOf, GradientNormRatio, GuardPolicy, NonFiniteError, StableRankFloor, StateError
from pss_param.integrations.missing import MissingPackageError

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel, Trainer, TrainingArguments, set_seed

from pss_param.integrations.transformers import PSSCallback

DATA = [{"input_ids": (torch.arange(8) * (i % 5 + 1) + i) % 17} for i in range(64)]
for window in DATA:
    window["labels"] = window["input_ids"]


def trainer(folder, *callbacks, kind=Trainer, shape=(), **options):
    set_seed(0)
    config = OpenAIGPTConfig(vocab_size=17, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    config.update(dict(shape))
    model = OpenAIGPTLMHeadModel(config)
    settings = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "logging_steps": 2,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = TrainingArguments(output_dir=str(folder), **{**settings, **options})
    return kind(model=model, args=args, train_dataset=DATA, eval_dataset=DATA[:8], callbacks=list(callbacks))


def trained(folder, *callbacks, resume=None, **options):
    one = trainer(folder, *callbacks, **options)
    one.train(resume_from_checkpoint=resume)
    return one


def weights(one):
    return {name: value.detach().clone() for name, value in one.model.state_dict().items()}


def lines(one):
    timing = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}
    return [{key: value for key, value in line.items() if key not in timing} for line in one.state.log_history]


def is_plain(one):
    guarded = any(parametrize.is_parametrized(module) for module in one.model.modules())
    return not guarded and "log" not in vars(one) and "clip_grad_norm_" not in vars(one.accelerator)


def test_the_example_dies_without_the_guard_and_lives_with_it(tmp_path):
    main = example("train_with_transformers")
    assert main(guarded=False, folder=str(tmp_path / "dead")) > UNIGRAM - 0.15
    assert main(guarded=True, folder=str(tmp_path / "alive")) < UNIGRAM - 0.3


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_norm_is_seen_before_clipping_once_per_optimizer_step(tmp_path, accumulation):
    seen = {}
    for limit in (0.0, 1e-3):
        seen[limit] = []
        detector = OnSteps(notes=seen[limit])
        # Adam's steps do not depend on the gradient's scale but for its epsilon.
        options = {"max_grad_norm": limit, "adam_epsilon": 1e-30, "gradient_accumulation_steps": accumulation}
        trained(tmp_path, PSSCallback(detector=detector), max_steps=3, **options)
    assert len(seen[0.0]) == len(seen[1e-3]) == 3
    assert seen[0.0] == pytest.approx(seen[1e-3], rel=0.03)
    assert seen[0.0][0] == seen[1e-3][0] > 0.1


class OwnClipping(Trainer):
    """Asks the accelerator for no norm, as some paths of some versions do."""

    def _clip_grad_norm(self, model):
        return torch.nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        return grad_norm


def test_where_the_accelerator_is_not_asked_the_norm_is_computed_or_its_clipping_is_told(tmp_path, caplog):
    seen = {}
    for limit in (0.0, 1e-3):
        seen[limit] = []
        callback = PSSCallback(detector=OnSteps(notes=seen[limit]))
        trained(tmp_path, callback, kind=OwnClipping, max_grad_norm=limit, max_steps=3)
    assert min(seen[0.0]) > 0.1
    assert max(seen[1e-3]) == pytest.approx(1e-3, rel=1e-2)
    assert sum("clips gradients on a path of its own" in message for message in caplog.messages) == 1


def test_a_quiet_guard_changes_no_bit_and_leaves_no_trace(tmp_path):
    callback = PSSCallback(detector=OnSteps())
    guarded = trained(tmp_path, callback)
    assert same(weights(trained(tmp_path)), weights(guarded))
    assert callback.guard is None
    assert is_plain(guarded)


def test_metrics_are_in_the_training_logs(tmp_path):
    one = trained(tmp_path, PSSCallback(detector=OnSteps(3)), eval_strategy="steps", eval_steps=4)
    logs = [line for line in one.state.log_history if "loss" in line]
    assert [line["pss_triggers"] for line in logs] == [0, 1, 1, 1]
    assert [line["pss_ratio"] for line in logs] == [1, 3, 1, 1]
    assert not any("pss_ratio" in line for line in one.state.log_history if "loss" not in line)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2, "bf16": True}], ids=["plain", "bf16+acc"])
def test_resuming_is_bit_exact_with_an_open_gate_and_checkpoints_are_plain(tmp_path, options):
    def callback():
        detector = AnyOf(OnSteps(4, 6), GradientNormRatio(settle=2), StableRankFloor(period=2))
        return PSSCallback(detector=detector, policy=GuardPolicy(reset_moments=True))

    settings = {"save_strategy": "steps", "save_steps": 4, **options}
    whole = trained(tmp_path / "whole", callback(), **settings)
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    assert whole.state.log_history[1]["pss_triggers"] >= 1  # at step 4: saved with an open gate
    trained(tmp_path / "bare", max_steps=4, **settings)
    expected = load_file(tmp_path / "bare" / "checkpoint-4" / "model.safetensors")
    saved = load_file(checkpoint / "model.safetensors")
    assert [(key, saved[key].shape) for key in saved] == [(key, expected[key].shape) for key in expected]
    # The Trainer must not be asked for a thing: the state is found in its own file.
    entry = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["PSSCallback"]
    assert entry["attributes"]["saved"]["guard"]["counters"]["steps"] == 4
    resumed = trained(tmp_path / "again", callback(), resume=str(checkpoint), **settings)
    assert same(weights(whole), weights(resumed))
    assert lines(whole) == lines(resumed)
    later = trained(tmp_path / "later", resume=str(checkpoint), **settings)  # and without us
    assert later.state.global_step == 8


def test_a_checkpoint_made_without_the_callback_is_resumed_with_it(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4}
    trained(tmp_path / "bare", max_steps=4, **settings)
    one = trained(tmp_path / "more", PSSCallback(), resume=str(tmp_path / "bare" / "checkpoint-4"), **settings)
    entry = json.loads((tmp_path / "more" / "checkpoint-8" / "trainer_state.json").read_text())
    assert entry["stateful_callbacks"]["PSSCallback"]["attributes"]["saved"]["guard"]["counters"]["steps"] == 4
    assert is_plain(one)


def test_callbacks_made_anew_by_the_trainer_work_or_are_refused(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4}
    restore = {"restore_callback_states_from_checkpoint": True}
    whole = trained(tmp_path / "default", PSSCallback(), **settings)
    checkpoint = str(tmp_path / "default" / "checkpoint-4")
    again = trained(tmp_path / "again", PSSCallback(), resume=checkpoint, **settings, **restore)
    assert lines(whole) == lines(again)
    trained(tmp_path / "other", PSSCallback(edge="bulk"), max_steps=4, **settings)
    checkpoint = str(tmp_path / "other" / "checkpoint-4")
    with pytest.raises(StateError, match="leave it False"):
        trained(tmp_path / "no", PSSCallback(edge="bulk"), resume=checkpoint, **settings, **restore)


def test_load_best_model_at_end_with_bf16_accumulation_and_evaluation(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    settings |= {"load_best_model_at_end": True, "bf16": True, "gradient_accumulation_steps": 2}
    one = trained(tmp_path, PSSCallback(detector=OnSteps(2, 8)), **settings)
    best = load_file(f"{one.state.best_model_checkpoint}/model.safetensors")
    now = weights(one)
    assert all(torch.equal(best[key], now[key]) for key in best)
    assert is_plain(one)


# One layer for speed; no dropout, which inductor draws from random numbers of its own.
COMPILED = {"n_layer": 1, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_compile(tmp_path, backend):
    torch._dynamo.reset()
    settings = {"torch_compile": True, "torch_compile_backend": backend, "max_steps": 6, "shape": COMPILED}
    compiled = trained(tmp_path, PSSCallback(detector=OnSteps(2, 4)), **settings)
    torch._dynamo.reset()
    policy = GuardPolicy(prepare="eager")
    eager = trained(tmp_path, PSSCallback(detector=OnSteps(2, 4), policy=policy), max_steps=6, shape=COMPILED)
    assert [line.get("pss_triggers") for line in compiled.state.log_history] == [1, 2, 2, None]
    one, two = weights(compiled), weights(eager)
    assert all(torch.allclose(one[key], two[key], atol=1e-4) for key in one)
    assert is_plain(compiled)


def test_an_aborted_run_can_be_followed_by_another(tmp_path):
    callback = PSSCallback(policy=GuardPolicy(max_nonfinite=1))
    one = trainer(tmp_path, callback)
    bias = one.model.transformer.h[0].mlp.c_fc.bias
    hook = bias.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteError, match="pss-repair"):
        one.train()
    hook.remove()
    one.train()
    assert callback.state()["attributes"]["saved"]["guard"]["counters"]["steps"] == 8
    assert is_plain(one)


def test_a_callback_without_a_trainer_says_how_to_pass_it():
    with pytest.raises(StateError, match=r"callbacks=\[PSSCallback\(\)\]"):
        PSSCallback().on_train_begin(None, None, None, model=torch.nn.Linear(2, 2))


@pytest.mark.parametrize(("name", "extra"), [("transformers", "hf"), ("lightning", "lightning")])
def test_a_missing_package_names_the_extra(monkeypatch, name, extra):
    monkeypatch.setitem(sys.modules, {"transformers": "transformers.trainer_callback"}.get(name, name), None)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, f"pss_param.integrations.{name}", raising=False)
    with pytest.raises(MissingPackageError, match=rf'pip install "pss-param\[{extra}\]"') as caught:
        importlib.import_module(f"pss_param.integrations.{name}")
    assert isinstance(caught.value, ImportError)


def test_importing_the_package_imports_no_trainer():
    code = "import sys, pss_param; print(sorted({'transformers', 'lightning', 'accelerate'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
