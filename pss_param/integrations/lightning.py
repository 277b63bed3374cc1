# SPDX-License-Identifier: Apache-2.0
r"""A guard for Lightning.

# Note [Automatic and manual optimization]
In automatic optimization Lightning calls ``on_before_optimizer_step`` with accumulated, unscaled, not yet clipped
gradients: the guard takes its step there. In manual optimization the same event comes inside the user's own
``optimizer.step()``, when the user may have clipped already. So whoever clips by hand takes the guard's step by
hand too, ``callback.step(norm)``, and the event that follows leaves it alone.

# Note [Several optimizers]
They may share one backward pass (Muon for matrices, AdamW for the rest) or alternate with losses of their own
(generator and discriminator). The events look alike, but in the first case a step per event would count a gradient
twice, and in the second it would mix two networks' norms in one average. So with several optimizers nothing is
guessed: the loop takes the guard's step, or holds a guard for each network.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pss_param.detector import Detector
from pss_param.errors import StateError
from pss_param.event import Event
from pss_param.guard import Guard
from pss_param.policy import GuardPolicy
from pss_param.smoothing import Smoothing
from pss_param.targets import TargetRules

from .keeper import AttachOptions, GuardKeeper
from .missing import MissingPackageError

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise MissingPackageError("lightning", "lightning") from error

__all__ = ["PSSCallback"]


class PSSCallback(Callback):
    r"""Guard the module that a Lightning ``Trainer`` fits: ``Trainer(..., callbacks=[PSSCallback()])``.

    The guard is attached when fitting begins and detached when it ends. In automatic optimization nothing else is
    needed. In manual optimization, call :meth:`step` between ``manual_backward`` and ``optimizer.step()`` if you clip
    gradients or have several optimizers; otherwise the guard steps by itself. Its state goes into Lightning's
    checkpoints and comes back with ``trainer.fit(ckpt_path=...)``, bit for bit; the weights in these checkpoints are
    plain. ``pss_ratio`` (the largest since the last step), ``pss_triggers`` and ``pss_skipped`` are logged.

    Args:
        targets: A preset such as ``"linear"`` (every matrix inside the blocks), or rules.
        smoothing: A shape by name or as a callable, or a whole :class:`pss_param.Smoothing`.
        edge: The level to which dominant values are brought; None as in :func:`pss_param.attach`.
        detector: None for the default of :func:`pss_param.attach`.
        policy: None for :class:`pss_param.GuardPolicy` with its defaults.

    Example:
        >>> callback = PSSCallback(targets="all")
        >>> callback.guard is None  # until fitting begins
        True
    """

    def __init__(
        self,
        targets: str | TargetRules = "linear",
        smoothing: str | Smoothing | Callable[[Tensor, Tensor], Tensor] = "clip",
        edge: str | None = None,
        detector: Detector | None = None,
        policy: GuardPolicy | None = None,
    ) -> None:
        super().__init__()
        self._keeper = GuardKeeper(AttachOptions(targets, smoothing, edge, detector, policy))
        self._loaded: dict[str, Any] | None = None
        self._seen_steps = self._logged_steps = self._steps_before_batch = 0

    @property
    def guard(self) -> Guard | None:
        r"""The guard while fitting, else None."""
        return self._keeper.guard

    def step(self, grad_norm: float | Tensor | None = None, *, optimizer: torch.optim.Optimizer | None = None) -> Event:
        r"""Let the guard take its step by hand, in manual optimization: once per gradient, before its optimizers step.

        Args:
            grad_norm: Global gradient norm *before* clipping, as ``clip_grad_norm_`` returns it; None computes it.
            optimizer: The optimizer, needed for ``GuardPolicy(reset_moments=True)`` only.

        Returns:
            What was seen and done.
        """
        return self._keeper.step(grad_norm, optimizer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        r"""Attach.

        Args:
            trainer: The trainer.
            pl_module: The module to guard.
        """
        guard = self._keeper.start(pl_module, self._loaded)
        self._loaded = None
        self._seen_steps = self._logged_steps = guard.steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        r"""Refuse optimizers that evaluate several gradients in one step.

        Args:
            trainer: The trainer.
            pl_module: Not used.

        Raises:
            StateError: If an optimizer is LBFGS.
        """
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
            raise StateError(
                "LBFGS evaluates several gradients within one step and compares their losses, so no gate may move "
                "in between; use another optimizer, or train without PSSCallback"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        r"""Remember where the batch began.

        Args:
            trainer: Not used.
            pl_module: Not used.
            batch: Not used.
            batch_idx: Not used.
        """
        if self._keeper.guard is not None:
            self._steps_before_batch = self._keeper.guard.steps

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        r"""Let the guard take its step, unless :meth:`step` was called by hand or there is no gradient.

        Args:
            trainer: The trainer.
            pl_module: The guarded module.
            optimizer: The optimizer about to step.

        Raises:
            StateError: If there are several optimizers and :meth:`step` was not called in this batch.
        """
        guard = self._keeper.guard
        if guard is None:
            return
        if len(trainer.optimizers) > 1:
            if guard.steps == self._steps_before_batch:
                raise StateError(
                    f"with {len(trainer.optimizers)} optimizers only the training step knows which of them use one "
                    "gradient: if they share a backward pass, call callback.step() once between manual_backward() and "
                    "the first optimizer.step(); if each network has a loss of its own, drop PSSCallback and keep a "
                    "guard for each, guard = pss_param.attach(self.generator), with guard.step() before its "
                    "optimizer's step"
                )
            return
        by_hand = guard.steps != self._seen_steps
        # A training step may return None to leave a batch out.
        if not by_hand and any(parameter.grad is not None for parameter in pl_module.parameters()):
            self._keeper.step(None, optimizer)
        self._seen_steps = guard.steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        r"""Log, after batches in which the guard took a step.

        Args:
            trainer: The trainer.
            pl_module: Takes the metrics.
            outputs: Not used.
            batch: Not used.
            batch_idx: Not used.
        """
        guard = self._keeper.guard
        if guard is not None and guard.steps != self._logged_steps:
            self._logged_steps = guard.steps
            pl_module.log_dict(self._keeper.metrics(), on_step=True, on_epoch=False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        r"""Fold and detach.

        Args:
            trainer: The trainer.
            pl_module: The guarded module.
        """
        self._keeper.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        r"""Fold and detach after an error or an interruption.

        Args:
            trainer: The trainer.
            pl_module: The guarded module.
            exception: What ended the fit.
        """
        self._keeper.release()

    def state_dict(self) -> dict[str, Any]:
        r"""Give Lightning what its checkpoint keeps of this callback.

        Returns:
            The guard's state, that of the last fit after its end; empty before the first.
        """
        return self._keeper.state() or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        r"""Take the state back; before the fit it waits for the guard.

        Args:
            state_dict: What :meth:`state_dict` returned.
        """
        if self._keeper.guard is None:
            self._loaded = state_dict
        else:
            self._keeper.guard.load_state_dict(state_dict)
            self._seen_steps = self._logged_steps = self._keeper.guard.steps
