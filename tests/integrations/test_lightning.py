# SPDX-License-Identifier: Apache-2.0
import inspect
import math

import pytest
import torch
from scripted import UNIGRAM, OnSteps, example, same
from torch import nn
from torch.nn.utils import parametrize

from pss_param import AnyOf, GradientNormRatio, GuardPolicy, NonFiniteError, StableRankFloor, StateError, attach

lightning = pytest.importorskip("lightning")
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402

from pss_param.integrations.lightning import PSSCallback  # noqa: E402

BATCHES = [torch.randn(8, 6, generator=torch.Generator().manual_seed(i)) for i in range(16)]


class Plain(lightning.LightningModule):
    def __init__(self, optimizer=torch.optim.AdamW):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
        self.make, self.factor, self.losses = optimizer, 1.0, []

    def batch(self):
        # By the step and not by the loader, which starts again from its beginning after a resumption.
        return BATCHES[self.trainer.global_step]

    def loss(self, x):
        loss = (self.net(x) - x.sum(1, keepdim=True)).square().mean() * self.factor
        self.losses.append(loss.item())
        return loss

    def training_step(self, batch, index):
        return self.loss(self.batch())

    def configure_optimizers(self):
        return self.make(self.parameters(), lr=3e-2)


class Manual(Plain):
    """Optimizes by hand; ``clip`` clips by hand, with or without telling the guard."""

    def __init__(self, callback=None, clip=False):
        super().__init__()
        self.automatic_optimization = False
        self.callback, self.clip = callback, clip

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(self.batch()))
        if self.clip:
            norm = nn.utils.clip_grad_norm_(self.parameters(), 1e-3)
            self.callback.step(norm)
        optimizer.step()


def fitted(model, *callbacks, folder=None, ckpt_path=None, **options):
    settings = {"max_steps": 8, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    trainer = lightning.Trainer(callbacks=list(callbacks), **{**settings, **quiet, **options})
    trainer.fit(model, torch.utils.data.DataLoader(BATCHES, batch_size=None), ckpt_path=ckpt_path)
    return trainer


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def by_hand(model, detector, steps):
    """The same training without Lightning."""
    optimizer, guard = model.configure_optimizers(), attach(model, targets="all", detector=detector)
    for batch in BATCHES[:steps]:
        optimizer.zero_grad()
        model.loss(batch).backward()
        guard.step()
        optimizer.step()
    guard.detach()
    return weights(model)


@pytest.mark.slow
def test_the_example_dies_without_the_guard_and_lives_with_it():
    main = example("train_with_lightning")
    assert main(guarded=False) > UNIGRAM - 0.15
    assert main(guarded=True) < UNIGRAM - 0.3


@pytest.mark.slow
def test_manual_optimization_dies_without_the_guard_and_lives_with_it():
    module = inspect.getmodule(example("train_with_lightning"))

    class ByHand(module.ByteTransformer):
        """The example's network, optimized and clipped by hand."""

        def __init__(self, callback):
            super().__init__(lr=1e-2)
            self.automatic_optimization, self.callback = False, callback

        def training_step(self, batch, index):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            norm = nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            if self.callback is not None:
                self.callback.step(norm)
            optimizer.step()

    last = {}
    for callback in (None, PSSCallback()):
        lightning.seed_everything(0, verbose=False)
        model = ByHand(callback)
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        trainer = lightning.Trainer(
            max_steps=120, accelerator="cpu", logger=False, callbacks=[callback] if callback else [], **quiet
        )
        trainer.fit(model, module.batches())
        last[callback is not None] = sum(model.losses[-20:]) / 20
    assert last[False] > UNIGRAM - 0.15
    assert last[True] < UNIGRAM - 0.3


@pytest.mark.parametrize("make", [Plain, Manual], ids=["automatic", "manual"])
def test_lightning_does_what_a_plain_loop_does(make):
    model, callback = make(), PSSCallback(targets="all", detector=OnSteps(2, 5))
    fitted(model, callback)
    assert same(weights(model), by_hand(Plain(), OnSteps(2, 5), 8))
    assert callback.guard is None
    assert callback.state_dict()["counters"]["triggers"] == 2
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


def test_a_quiet_guard_changes_no_bit():
    plain, guarded = Plain(), Plain()
    fitted(plain, gradient_clip_val=0.1)
    fitted(guarded, PSSCallback(targets="all", detector=OnSteps()), gradient_clip_val=0.1)
    assert same(weights(plain), weights(guarded))


def test_the_norm_is_seen_before_clipping_once_per_optimizer_step():
    first = {}
    for limit in (None, 1e-3):
        notes = []
        options = {"gradient_clip_val": limit, "accumulate_grad_batches": 2, "max_steps": 3}
        fitted(Plain(), PSSCallback(targets="all", detector=OnSteps(notes=notes)), **options)
        assert len(notes) == 3
        first[limit] = notes[0]
    assert first[None] == first[1e-3] > 0.1


def test_who_clips_by_hand_steps_by_hand():
    notes = []
    callback = PSSCallback(targets="all", detector=OnSteps(notes=notes))
    fitted(Manual(callback, clip=True), callback, max_steps=3)
    assert len(notes) == 3
    assert min(notes) > 0.1
    with pytest.raises(StateError, match="outside of a training run"):
        callback.step(1.0)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("make", [Plain, Manual], ids=["automatic", "manual"])
def test_resuming_is_bit_exact_with_an_open_gate_and_checkpoints_are_plain(tmp_path, make, precision):
    def callback():
        detector = AnyOf(OnSteps(4, 6), GradientNormRatio(settle=2), StableRankFloor(period=2))
        return PSSCallback(targets="all", detector=detector)

    whole, saver = make(), ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    keeper = callback()
    fitted(whole, keeper, saver, enable_checkpointing=True, precision=precision)
    checkpoint = tmp_path / "step=4.ckpt"
    saved = torch.load(checkpoint, weights_only=True)
    assert list(saved["state_dict"]) == list(make().state_dict())
    assert saved["callbacks"]["PSSCallback"]["counters"]["triggers"] >= 1
    resumed, second = make(), callback()
    fitted(resumed, second, ckpt_path=checkpoint, precision=precision)
    assert same(weights(whole), weights(resumed))
    assert whole.losses[4:] == resumed.losses
    assert keeper.state_dict()["counters"] == second.state_dict()["counters"]
    fitted(make(), ckpt_path=checkpoint, precision=precision)  # and without us


def test_metrics_are_logged():
    trainer = fitted(Plain(), PSSCallback(targets="all", detector=OnSteps(8)))
    logged = {name: value.item() for name, value in trainer.logged_metrics.items()}
    assert logged == {"pss_triggers": 1.0, "pss_skipped": 0.0, "pss_ratio": 3.0}


def test_an_error_detaches_and_another_fit_works():
    model, callback = Plain(), PSSCallback(targets="all", policy=GuardPolicy(max_nonfinite=1))
    model.factor = math.nan
    with pytest.raises(NonFiniteError, match="pss-repair"):
        fitted(model, callback)
    assert callback.guard is None
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    model.factor = 1.0
    fitted(model, callback)
    assert callback.state_dict()["counters"]["steps"] == 8


def test_a_batch_that_is_left_out_is_no_step():
    class Lazy(Plain):
        def training_step(self, batch, index):
            return None if index == 1 else super().training_step(batch, index)

    callback = PSSCallback(targets="all", detector=OnSteps())
    fitted(Lazy(), callback, max_steps=4)
    assert callback.state_dict()["counters"]["steps"] == 3


def test_lbfgs_is_refused():
    with pytest.raises(StateError, match="LBFGS"):
        fitted(Plain(torch.optim.LBFGS), PSSCallback(targets="all"))


class TwoOptimizers(Plain):
    """A hidden layer for each of two optimizers that share one backward pass, as Muon and AdamW do."""

    def __init__(self, callback=None):
        super().__init__()
        self.automatic_optimization, self.callback = False, callback

    def configure_optimizers(self):
        halves = self.net[:2].parameters(), self.net[2:].parameters()
        return [torch.optim.SGD(half, lr=1e-2) for half in halves]

    def training_step(self, batch, index):
        optimizers = self.optimizers()
        self.manual_backward(self.loss(batch))
        if self.callback is not None:
            self.callback.step()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_several_optimizers_are_refused_unless_the_loop_says_what_one_gradient_is():
    callback = PSSCallback(targets="all", detector=OnSteps())
    with pytest.raises(StateError, match=r"2 optimizers.*callback\.step\(\).*guard for each"):
        fitted(TwoOptimizers(), callback)
    assert callback.guard is None
    notes = []
    callback = PSSCallback(targets="all", detector=OnSteps(2, notes=notes))
    fitted(TwoOptimizers(callback), callback, max_steps=10)  # Lightning counts the steps of both
    assert len(notes) == 5, "one gradient, one step"
    assert callback.state_dict()["counters"]["triggers"] == 1


class Rivals(Plain):
    """Two networks with losses and optimizers of their own, each under a guard of its own."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.second = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))
        self.guards = [attach(part, "all", detector=GradientNormRatio(settle=2)) for part in (self.net, self.second)]

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=1e-6) for part in (self.net, self.second)]

    def training_step(self, batch, index):
        for part, guard, optimizer, scale in zip(
            (self.net, self.second), self.guards, self.optimizers(), (1, 1000), strict=True
        ):
            optimizer.zero_grad()
            self.manual_backward((part(batch) - batch.sum(1, keepdim=True)).square().mean() * scale)
            guard.step()
            optimizer.step()

    def on_save_checkpoint(self, checkpoint):
        checkpoint["guards"] = [guard.state_dict() for guard in self.guards]


def test_the_way_out_keeps_an_average_for_each_network(tmp_path):
    model = Rivals()
    fitted(model, ModelCheckpoint(tmp_path), enable_checkpointing=True, max_steps=16)
    small, large = (float(guard.detector.average) for guard in model.guards)
    assert large > 100 * small
    assert [guard.triggers for guard in model.guards] == [0, 0]
    (path,) = tmp_path.glob("*.ckpt")
    saved = torch.load(path, weights_only=True)
    assert [state["counters"]["steps"] for state in saved["guards"]] == [8, 8]
