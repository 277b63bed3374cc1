# SPDX-License-Identifier: Apache-2.0
r"""The guard: one detector, the views of one model, and their life together.

# Note [One step of the guard]
``step()`` comes after the backward pass and before the optimizer's step. It first folds what the last trigger
left open: the forward pass has seen the smoothed weights, now they become the stored ones. Then it judges the
new gradient and, if the detector fires, opens gates. No linear algebra runs here, except under ``torch.compile``.

# Note [What a quiet step costs]
After a forward and backward pass the caches hold nothing of the interpreter, so every object, dictionary and tensor
operation that a step touches costs about ten times what it costs in a loop of its own. So a step that finds nothing
asks no view and makes no tensor: it reads one number, compares it and keeps Python floats.

# Note [Resuming bit by bit]
While a gate is open the model's ``state_dict`` has the smoothed values, with the bits that the fold will store.
So a checkpoint never holds an open gate, and the guard's state needs only counters and statistics: the resumed
run starts with folded weights, which is what the next forward pass of the saved run would have seen.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pss_param.announcing import Announcer
from pss_param.compiled import is_compiled, listen, note_traced, tag_of, was_traced
from pss_param.damping import Damping
from pss_param.detector import Detector, Matrix, Origin, Verdict
from pss_param.errors import ArgumentError, StateError
from pss_param.event import Event
from pss_param.gradients import clear_nonfinite, drop_gradients, gradient_norm, treat_gradient
from pss_param.moments import reset_moments
from pss_param.opening import open_views, stand_by
from pss_param.policy import GuardPolicy
from pss_param.reading import Reading, read_now
from pss_param.removal import detach, view_at
from pss_param.resharding import reshard
from pss_param.resuming import check_state, copied_state
from pss_param.room import live_room
from pss_param.slot import Slot
from pss_param.smoothing import holds
from pss_param.view import SmoothingView, inside_backward, refuse_inside_backward
from pss_param.watched import require_no_pending, watched_matrices
from pss_param.watching import Watch, refuse_line_search

__all__ = ["Guard", "detach"]

_log = logging.getLogger("pss_param")
_COUNTERS = ("steps", "triggers", "nonfinite", "resting")

# What a spike of the gradient divides updates of companions by, where norms of weights are measured. Chosen on single
# runs: perceptrons that go on after a repair end lower for it, and a healthy deep GPT, whose gradient spikes by itself,
# does not notice.
_SPIKE = 2.0


class Guard:
    r"""Detector, views and life cycle of one model; made by :func:`pss_param.attach`.

    As a context manager it detaches at the end.

    Attributes:
        model: The guarded model.
        detector: Decides when and what to smooth.
        policy: What happens besides smoothing.
        views: The views by weight name.
        steps: Steps taken.
        triggers: Steps at which the detector found something new, and gates were opened.
        nonfinite: Non-finite gradient norms in a row, up to now.
        resting: Steps left in which triggers are held back.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: Mapping[str, list[Slot]],
        detector: Detector,
        policy: GuardPolicy,
        companions: Sequence[Slot] = (),
    ) -> None:
        self.model, self.detector, self.policy = model, detector, policy
        self._slots, self._companions = dict(slots), tuple(companions)
        self.views: dict[str, SmoothingView] = {}
        self._opened: set[str] = set()
        self._tag = tag_of(model)
        for name, holders in self._slots.items():
            view = self.views[name] = view_at(holders[0])
            view.opened, view.tag = self._opened, self._tag
        self._first = next(iter(self._slots.values()))[0]
        self._placed = self._first.views
        self.steps = self.triggers = self.nonfinite = self.resting = 0
        self._stale: set[str] = set()
        self._struck: set[str] = set()
        self._attached = True
        self._previewing = False
        self._announcer = Announcer(policy)
        self._damping = Damping(self._stored, self._following, len(self.views), on=policy.damping > 1)
        self._padded_rank = 16
        self._deferred: Reading | None = None
        self._watch: Watch | None = None
        listen()
        detector.hold(self._origins())
        detector.bind(self._matrices)

    @property
    def is_open(self) -> bool:
        r"""Whether any gate is open, that is whether a smoothing waits to be folded."""
        return bool(self._opened)

    @property
    def damping(self) -> dict[str, float]:
        r"""What the optimizer's updates are divided by, for the guarded weights of which that is more than 1."""
        return dict(self._damping.rho)

    def step(self, grad_norm: float | Tensor | None = None, *, optimizer: torch.optim.Optimizer | None = None) -> Event:
        r"""Fold what is open, judge the new gradient, and open gates if the detector fires.

        Call it after ``backward()`` and before ``optimizer.step()``; with gradient accumulation once per
        optimizer step, with a gradient scaler after ``scaler.unscale_(optimizer)``.

        Args:
            grad_norm: Global norm of the unscaled gradient *before* clipping, such as ``clip_grad_norm_`` returns
                it; None computes it from the gradients. Pass it if you have it, it saves a pass over them.
            optimizer: The optimizer, needed for ``GuardPolicy(reset_moments=True)``, to damp the first trigger's
                update if this is called inside the optimizer's step, from a closure, and to skip its step as a whole
                where the guard holds only a part of what it moves.

        Returns:
            What was seen and done. On ``event.skip`` the gradients of the guarded module are gone, and with
            ``optimizer`` those of all its parameters, so that ``optimizer.step()`` is harmless. If it moves other
            parameters and was not given, leave its step out yourself.

        Raises:
            StateError: If the guard is detached, previewing or watching an optimizer, a backward pass or an LBFGS
                step runs, or no gradients exist.
            ArgumentError: If moments are to be reset and no optimizer is given.
            NonFiniteError: After ``max_nonfinite`` non-finite gradient norms in a row.
        """
        self._require_ready("guard.step()")
        self._refuse_second_caller()
        refuse_line_search(optimizer)
        if self.policy.reset_moments and optimizer is None:
            raise ArgumentError("GuardPolicy(reset_moments=True) needs guard.step(optimizer=optimizer)")
        norm = gradient_norm(self.model) if grad_norm is None else grad_norm
        if self._opened or self._stale:
            self._fold_and_reset(optimizer)
        if self._damping.active:
            self._damping.forget()
        self.steps += 1
        looks = self.detector.look(self._matrices)
        if self.policy.deferred:
            reading = self._exchanged(Reading(norm, looks), optimizer)
            if reading is None:
                return self._tell(Event(self.steps, False, math.nan, reason="decisions come one step later"))
            value, seen = reading.read()
        else:
            value, seen = read_now(norm, looks)
        if not math.isfinite(value):
            return self._tell(self._skip_nonfinite(value, optimizer))
        self.nonfinite = 0
        verdict = self.detector.judge(value, seen)
        if not verdict.triggered and not verdict.held and not self.resting:
            return Event(self.steps, False, value, verdict.ratio)
        event = self._act(value, verdict, optimizer)
        spike = event.triggered and not event.held and verdict.names is None and verdict.pace is not None
        self._damping.strike(self._factors(verdict, event.smoothed), optimizer, _SPIKE if spike else 1.0)
        return self._tell(event)

    def watch(self, optimizer: torch.optim.Optimizer) -> Watch:
        r"""Step before every ``optimizer.step()`` from now on, where the loop itself cannot be changed.

        A fallback: behind ``clip_grad_norm_`` it sees clipped norms only, and warns. The factor of a gradient scaler
        is taken out. Of several optimizers watch the one that steps first.

        Args:
            optimizer: The optimizer; watching the same one again changes nothing.

        Returns:
            The handle; ``handle.remove()`` ends it, and so does :meth:`detach`.

        Raises:
            StateError: If another optimizer is watched, the optimizer is LBFGS, or the guard is detached or
                previewing.
        """
        self._require_ready("guard.watch()")
        refuse_line_search(optimizer)
        if self._watch is None or self._watch.optimizer is None:
            self._watch = Watch(self, optimizer)
        if self._watch.optimizer is not optimizer:
            raise StateError(
                "the guard watches another optimizer already, and two of them would step it twice; remove() that "
                "handle, or call guard.step() in the loop"
            )
        return self._watch

    def fold(self) -> None:
        r"""Write every pending smoothing into the stored weights now and close the gates.

        Raises:
            StateError: If the guard is detached or previewing, or a backward pass runs.
        """
        self._require_ready("guard.fold()")
        self._fold_and_reset(None)

    def discard(self) -> None:
        r"""Drop every pending smoothing and close the gates; the stored weights stay as they are.

        Raises:
            StateError: If the guard is detached or previewing, a backward pass runs, or one is yet to come for a
                forward pass that read smoothed weights.
        """
        self._require_ready("guard.discard()")
        for view in self.views.values():
            view.discard()

    @contextmanager
    def preview(self) -> Iterator[None]:
        r"""Show the model with every target smoothed, and forget that afterwards.

        Gates that are open already show what they hold and stay open.

        Yields:
            Nothing; read the model inside, under ``torch.no_grad()`` or with its backward pass inside too.

        Raises:
            StateError: If the guard is detached or previewing, or if at the end a backward pass is yet to come.
        """
        self._require_ready("guard.preview()")
        shown = [view for view in self.views.values() if not view.is_open]
        standing = {view.label for view in shown if view.is_read}
        self._previewing = True
        try:
            self._open(shown)
            yield
            require_no_pending(shown)
        finally:
            self._previewing = False
            for view in shown:
                view.close()
            if standing:
                stand_by(self.model, self._slots, self.views.values(), self._padded_rank)

    def detach(self) -> None:
        r"""Fold, then remove the views; the model is what it was. Does nothing the second time.

        Raises:
            StateError: If the guard is previewing, a backward pass runs, or a parametrization lies over a view.
        """
        if self._attached:
            self._require_ready("guard.detach()")
            detach(self.model)
            self._attached = False
            self._damping.stop()
            if self._watch is not None:
                self._watch.remove()

    def state_dict(self) -> dict[str, Any]:
        r"""Everything that a bit-exact resumption needs besides the model's own ``state_dict``.

        Returns:
            Tensors, numbers and dictionaries of them, safe for ``weights_only`` loading.
        """
        # A pending opening is folded in the model's state, so here it counts as over.
        openings = {name: view.openings + view.is_open for name, view in self.views.items()}
        counters = {name: getattr(self, name) for name in _COUNTERS}
        # A resumed run may reach a trigger before the program that told this one has been compiled again.
        counters["compiled"] = int(self._is_compiled())
        detector = copied_state(self.detector)
        # The moments of a weight that is saved folded are to be cleared by the resumed run, at its next step.
        waiting = {
            name: name in self._stale or (self.policy.reset_moments and view.is_open and name in self._struck)
            for name, view in self.views.items()
        }
        stale = {name: int(value) for name, value in waiting.items()}
        damping = {name: self._damping.rho.get(name, 1.0) for name in self.views}
        state = {"detector": detector, "counters": counters, "openings": openings, "stale": stale, "damping": damping}
        return {**state, "following": self._damping.following, **self._on_its_way()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        r"""Take a state back. Load the model's state too; gates that are open are closed without a fold.

        Args:
            state: What :meth:`state_dict` returned, of a guard over the same weights.

        Raises:
            ArgumentError: If it belongs to other weights or lacks an entry.
            StateError: If the guard is detached or previewing, or a backward pass runs.
        """
        self._require_ready("guard.load_state_dict()")
        check_state(state, self.views, self.detector)
        self.detector.load_state_dict(state["detector"])
        self._struck.clear()
        self._stale = {name for name, value in state.get("stale", {}).items() if value}
        damping = state.get("damping", {})
        factors = {name: float(damping.get(name, 1.0)) for name in self.views}
        self._damping.load(factors, float(state.get("following", 1.0)))
        for name, view in self.views.items():
            view.close()
            view.openings = int(state["openings"][name])
        for name in _COUNTERS:
            setattr(self, name, int(state["counters"][name]))
        if state["counters"].get("compiled"):
            note_traced(self._tag)
        on_its_way = state.get("deferred")
        self._deferred = Reading.of(on_its_way) if on_its_way else None

    def _on_its_way(self) -> dict[str, Any]:
        if not self.policy.deferred:
            return {}
        return {"deferred": [] if self._deferred is None else self._deferred.state()}

    def __enter__(self) -> "Guard":
        r"""Enter a block at whose end the guard detaches.

        Returns:
            The guard.

        Raises:
            StateError: If it is detached.
        """
        self._require_ready("with guard")
        return self

    def __exit__(self, *exception: object) -> None:
        r"""Detach.

        Args:
            *exception: What ended the block, if anything did.
        """
        self.detach()

    def __repr__(self) -> str:
        r"""Tell the guard in one line.

        Returns:
            Number of weights, smoothing, gate, detector and counts.
        """
        if not self._attached:
            return f"Guard(detached after {self.steps} steps, {self.triggers} triggers)"
        smoothing = next(iter(self.views.values())).smoothing
        opened = sum(view.is_open for view in self.views.values())
        detector = " ".join(str(self.detector).split())
        gate = f"{opened} gates open" if opened else "gates closed"
        return (
            f"Guard({len(self.views)} weights, {smoothing.shape} to the {smoothing.edge} edge, {gate}, "
            f"{detector}, {self.steps} steps, {self.triggers} triggers)"
        )

    def _require_ready(self, call: str) -> None:
        if not (self._attached and self._first.views is self._placed) or self._previewing or inside_backward():
            self._refuse(call)

    def _refuse(self, call: str) -> None:
        if not self._attached:
            raise StateError(f"{call} on a detached guard; attach again with pss_param.attach(model)")
        if self._first.views is not self._placed:
            raise StateError(f"{call}, but pss_param.detach(model) has removed its views; attach again")
        if self._previewing:
            raise StateError(f"{call} inside guard.preview(); leave the preview first")
        refuse_inside_backward(f"{call} cannot run")

    def _refuse_second_caller(self) -> None:
        if self._watch is not None and self._watch.optimizer is not None and not self._watch.stepping:
            raise StateError(
                "guard.watch(optimizer) steps this guard already, and a second step would count the gradient twice; "
                "drop this call, or remove() the handle that watch() returned"
            )

    def _stored(self, name: str) -> Tensor | None:
        slot = self._slots[name][0]
        return slot.module._parameters.get(slot.name) if self._first.views is self._placed else None

    def _following(self) -> list[Tensor]:
        # At other edges a smoothing does not tell whether the learning rate was at fault.
        if self._first.views is not self._placed or not holds(next(iter(self.views.values())).smoothing):
            return []
        found = (slot.module._parameters.get(slot.name) for slot in self._companions)
        return [parameter for parameter in found if parameter is not None]

    def _factors(self, verdict: Verdict, smoothed: Sequence[str]) -> dict[str, float]:
        """What each smoothed weight's damping is multiplied by."""
        damping, fast = self.policy.damping, self.policy.pace
        if verdict.pace is None:
            return dict.fromkeys(smoothed, damping)
        paces = {name: verdict.pace[name] for name in smoothed if name in verdict.pace}
        if self.policy.deferred:  # weights are measured once more before they are smoothed, so their pace is not known
            return dict.fromkeys(paces, damping)
        return {name: pace / fast for name, pace in paces.items() if pace > fast}

    def _matrices(self) -> dict[str, tuple[Matrix, ...]]:
        return watched_matrices(self._slots, self.views)

    def _fold_and_reset(self, optimizer: torch.optim.Optimizer | None) -> None:
        pending = [name for name, view in self.views.items() if view.is_open]
        if pending:
            reshard(self.model)
        for name, view in self.views.items():
            if view.is_read:
                view.fold_(self._slots[name][0].weight)
        if self.policy.reset_moments:  # of what a trigger has smoothed; what is only held changes little
            self._stale.update(self._struck.intersection(pending))
        self._struck.clear()
        if optimizer is not None:
            for name in self._stale:
                reset_moments(optimizer, self._slots[name][0].weight)
            self._stale.clear()
        if pending:
            # Inside a long autocast block the casts of the old values are still cached.
            torch.clear_autocast_cache()

    def _exchanged(self, reading: Reading, optimizer: torch.optim.Optimizer | None) -> Reading | None:
        """Send this step's reading on its way; the one of the step before is to be judged now."""
        clear_nonfinite(self.model, reading.norm, optimizer)
        before, self._deferred = self._deferred, reading.send()
        return before

    def _skip_nonfinite(self, norm: float, optimizer: torch.optim.Optimizer | None) -> Event:
        self.nonfinite += 1
        if not self.policy.deferred:
            drop_gradients(self.model, optimizer)
        self.policy.refuse_more_nonfinite(self.nonfinite)
        reason = f"gradient norm is {norm}, {self.nonfinite} in a row (error at {self.policy.max_nonfinite})"
        if self.policy.deferred:
            reason += "; its step had zeros for gradients"
            _log.warning("step %d: %s", self.steps, reason)
        return Event(self.steps, False, norm, reason=reason, skip=not self.policy.deferred)

    def _act(self, norm: float, verdict: Verdict, optimizer: torch.optim.Optimizer | None) -> Event:
        resting, self.resting = self.resting, max(0, self.resting - 1)
        fires = verdict.triggered and not resting
        reason = f"held back, cooldown: {verdict.reason}" if verdict.triggered and resting else verdict.reason
        struck = (tuple(self.views) if verdict.names is None else verdict.names) if fires else ()
        names = tuple(dict.fromkeys((*struck, *verdict.held)))
        if not names:
            return Event(self.steps, False, norm, verdict.ratio, reason)
        names = self._open([self.views[name] for name in names])
        if fires:
            self._count_trigger(struck)
        dropped = fires and treat_gradient(self.model, self.policy, norm, verdict.limit, optimizer)
        return Event(self.steps, True, norm, verdict.ratio, reason, names, dropped, not fires)

    def _count_trigger(self, names: Sequence[str]) -> None:
        self.triggers, self.resting = self.triggers + 1, self.policy.cooldown
        self._struck.update(names)

    def _origins(self) -> dict[str, Origin] | None:
        smoothings = {name: view.smoothing for name, view in self.views.items()}
        if not all(map(holds, smoothings.values())):
            return None
        rooms = {name: live_room(holders[0].name) for name, holders in self._slots.items()}
        return {name: Origin(smoothing.init_std, rooms[name]) for name, smoothing in smoothings.items()}

    def _open(self, views: Sequence[SmoothingView]) -> tuple[str, ...]:
        prepare = self.policy.prepare
        eager = prepare == "eager" or (prepare == "auto" and self._is_compiled())
        leveled = {view: self.detector.levels(view.label) for view in views}
        if views and views[0].smoothing.edge == "baseline":  # a weight that nobody remembers is left alone
            leveled = {view: levels for view, levels in leveled.items() if levels}
        self._padded_rank = open_views(self.model, self._slots, leveled, eager, self._padded_rank)
        if eager:
            stand_by(self.model, self._slots, self.views.values(), self._padded_rank)
        return tuple(view.label for view in leveled)

    def _is_compiled(self) -> bool:
        return was_traced(self._tag) or is_compiled(self.model)

    def _tell(self, event: Event) -> Event:
        return self._announcer.tell(event, self.triggers)
