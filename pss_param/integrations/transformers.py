# SPDX-License-Identifier: Apache-2.0
r"""A guard for the Hugging Face ``Trainer``.

# Note [Where the norm before clipping is seen]
The Trainer clips before its callbacks run, and a ratio of clipped norms is blind. So while a training run is on,
``trainer.accelerator.clip_grad_norm_`` is wrapped: it returns the norm before clipping, is called once per
optimizer step after accumulation and unscaling, and is called with an infinite limit where nothing is clipped.

# Note [How a callback finds its trainer]
The Trainer hands its model, optimizer and state to callbacks, but not itself, and nothing of what it hands over
refers back to it. It is, however, the caller of the event: the nearest ``self`` up the stack whose callbacks
include this one. So one line in the user's program is enough.

# Note [Resuming]
``trainer_state.json`` gets what :meth:`PSSCallback.state` returns. The Trainer gives it back only under
``restore_callback_states_from_checkpoint``, and then makes the callback anew without the user's settings. But a
resumed run's ``TrainerState`` holds the entry either way, and :meth:`PSSCallback.on_train_begin` reads it there.
"""

import inspect
import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pss_param.detector import Detector
from pss_param.errors import StateError
from pss_param.guard import Guard
from pss_param.policy import GuardPolicy
from pss_param.smoothing import Smoothing
from pss_param.targets import TargetRules

from .jsonstate import from_json, to_json
from .keeper import AttachOptions, GuardKeeper
from .missing import MissingPackageError
from .wrapping import Wrapping

try:
    from transformers.trainer_callback import ExportableState, TrainerCallback
except ImportError as error:
    raise MissingPackageError("transformers (with accelerate)", "hf") from error

__all__ = ["PSSCallback"]

_log = logging.getLogger("pss_param")


class PSSCallback(TrainerCallback, ExportableState):
    r"""Guard the model of a ``Trainer``: ``Trainer(..., callbacks=[PSSCallback()])`` and nothing else.

    The guard is attached when training begins and detached when it ends, so that the model is plain before and
    after. It judges the gradient norm before clipping, once per optimizer step. Its state goes into the Trainer's
    checkpoints (``trainer_state.json``) and comes back with ``trainer.train(resume_from_checkpoint=...)``, bit for
    bit. The weights in these checkpoints are plain. ``pss_ratio`` (the largest since the last line),
    ``pss_triggers`` and ``pss_skipped`` appear in the Trainer's training logs.

    Args:
        targets: A preset such as ``"linear"`` (every matrix inside the blocks), or rules.
        smoothing: A shape by name or as a callable, or a whole :class:`pss_param.Smoothing`.
        edge: The level to which dominant values are brought; None as in :func:`pss_param.attach`.
        detector: None for the default of :func:`pss_param.attach`.
        policy: None for :class:`pss_param.GuardPolicy` with its defaults.

    Example:
        >>> callback = PSSCallback(edge="bulk")
        >>> callback.guard is None  # until training begins
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
        self._keeper = GuardKeeper(AttachOptions(targets, smoothing, edge, detector, policy))
        self._wrappings: list[Wrapping] = []
        self._accelerator: Any = None
        self._norm: float | Tensor | None = None
        self._warned = False
        # Set by the Trainer alone; see Note [Resuming].
        self.saved: dict[str, Any] | None = None

    @property
    def guard(self) -> Guard | None:
        r"""The guard while training runs, else None."""
        return self._keeper.guard

    def state(self) -> dict[str, Any]:
        r"""Give the Trainer what its checkpoint keeps of this callback.

        Returns:
            A dictionary for JSON: how a callback of this class is made, and the guard's state.
        """
        guard = self._keeper.state()
        saved = None if guard is None else {"settings": repr(self._keeper.options), "guard": to_json(guard)}
        return {"args": {}, "attributes": {"saved": saved}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        r"""Attach, take back a saved state, and wrap what the Trainer calls between backward and step.

        Args:
            args: The Trainer's arguments.
            state: The Trainer's state; a resumed one holds this callback's.
            control: Not used.
            **kwargs: The model and more.

        Raises:
            StateError: If the callback was made anew without its settings, or DeepSpeed takes the steps.
        """
        self._release()
        trainer = _calling_trainer(self)
        _refuse_deepspeed(trainer)
        saved = _saved_state(state, type(self).__name__) if state.global_step else None
        if self.saved is not None and self.saved["settings"] != repr(self._keeper.options):
            raise StateError(
                "restore_callback_states_from_checkpoint=True makes callbacks anew without their settings; "
                "leave it False, PSSCallback takes its state back by itself"
            )
        self._keeper.start(kwargs["model"], None if saved is None else from_json(saved["guard"]))
        self._accelerator = trainer.accelerator
        self._wrappings = [
            Wrapping(trainer.accelerator, "clip_grad_norm_", self._keep_norm),
            Wrapping(trainer, "log", self._log_metrics),
        ]
        # Saving looks this entry up, which a checkpoint made without the callback lacks.
        state.stateful_callbacks[type(self).__name__] = self.state()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        r"""Let the guard take its step.

        Args:
            args: The Trainer's arguments.
            state: Not used.
            control: Not used.
            **kwargs: The model, the optimizer and more.
        """
        if self._norm is None:
            self._norm = self._unseen_norm(kwargs["model"], args)
        norm, self._norm = self._norm, None
        self._keeper.step(norm, kwargs["optimizer"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        r"""Fold, detach and undo the wrapping.

        Args:
            args: Not used.
            state: Not used.
            control: Not used.
            **kwargs: Not used.
        """
        self._release()

    def _release(self) -> None:
        for wrapping in self._wrappings:
            wrapping.undo()
        self._wrappings, self._norm = [], None
        self._keeper.release()

    def _keep_norm(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._norm = original(*args, **kwargs)
        return self._norm

    def _log_metrics(self, original: Callable[..., Any], logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        if "loss" in logs:  # a line about training, not an evaluation or the summary
            logs = {**logs, **self._keeper.metrics()}
        return original(logs, *args, **kwargs)

    def _unseen_norm(self, model: nn.Module, args: Any) -> Tensor | None:
        # Older Trainers ask for no norm when they do not clip; the accelerator also unscales and reduces.
        if not args.max_grad_norm:
            norm: Tensor = self._accelerator.clip_grad_norm_(model.parameters(), float("inf"))
            return norm
        if not self._warned:
            self._warned = True
            _log.warning(
                "this Trainer clips gradients on a path of its own, and the guard sees them clipped only: a ratio "
                "detector is blind then; set max_grad_norm=0 or use StableRankFloor"
            )
        return None


def _calling_trainer(callback: PSSCallback) -> Any:
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        callbacks = getattr(getattr(caller, "callback_handler", None), "callbacks", ())
        if any(one is callback for one in callbacks):
            return caller
        frame = frame.f_back
    raise StateError("no Trainer called this callback; pass it as Trainer(..., callbacks=[PSSCallback()])")


def _refuse_deepspeed(trainer: Any) -> None:
    if str(trainer.accelerator.distributed_type).endswith("DEEPSPEED"):
        raise StateError(
            "under DeepSpeed the optimizer steps inside the backward pass, before any callback; "
            "train with FSDP instead, or guard a loop of your own"
        )


def _saved_state(state: Any, name: str) -> dict[str, Any] | None:
    entry = state.stateful_callbacks.get(name)
    if isinstance(entry, list):  # the Trainer's form for several callbacks of one class
        entry = entry[-1]
    saved: dict[str, Any] | None = None if entry is None else entry["attributes"].get("saved")
    return saved
