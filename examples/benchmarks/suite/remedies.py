# SPDX-License-Identifier: Apache-2.0
"""What a person can do with a dead checkpoint."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch

import pss_param as pss
import pss_param.plan
from suite.deaths import Dead, Saved, phases
from suite.methods import METHODS
from suite.methods.base import Method
from suite.spec import Spec
from suite.task import Task, tasks
from suite.training import Run, Trace, evaluate, fresh, go_on, outcome, skip

StateDict = dict[str, Any]
Surgery = Callable[[StateDict], tuple[StateDict, bool]]
"""Gives new weights, and whether the optimizer is to begin anew with them."""


def repair(**options: Any) -> Surgery:
    """What `pss-repair` does.

    Args:
        options: fields of :class:`pss_param.RepairOptions`.

    Returns:
        From a state dict to the repaired one, and whether that resets the optimizer.
    """
    given = pss.RepairOptions(**options, device="cpu")

    def operate(state: StateDict) -> tuple[StateDict, bool]:
        repaired, report = pss.repair_state_dict(state, given)
        # What --optimizer auto does where the checkpoint has an optimizer: pss_param.optimizer_edit.
        return repaired, given.optimizer == "auto" and report.options["strength"] == "deep"

    return operate


def with_constant(name: str, value: Any) -> Surgery:
    """A deep repair with another constant of :mod:`pss_param`: what the docstrings' reasons for them rest on.

    Args:
        name: dotted name.
        value: what stands there meanwhile.

    Returns:
        See :func:`repair`.
    """
    operate = repair(strength="deep")

    def changed(state: StateDict) -> tuple[StateDict, bool]:
        with mock.patch(name, value):
            return operate(state)

    return changed


_outside = pss_param.plan._outside


def _no_tables(*args: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return _outside(*args)[0], {}


def rescale(state: StateDict) -> tuple[StateDict, bool]:
    """Scale every block matrix down to the spectral norm of a fresh one: W * min(1, fresh / S[0]).

    Args:
        state: the model's state dict.

    Returns:
        Another; the optimizer goes on.
    """
    infos = {name: pss.TensorInfo(tuple(value.shape), value.dtype) for name, value in state.items()}
    result = dict(state)
    for target in pss.select_tensors(infos, pss.TargetRules()).targets:
        W = state[target.name]
        m, n = W.flatten(1).shape
        fresh_norm = (m**0.5 + n**0.5) / (3 * n) ** 0.5
        result[target.name] = W * torch.clamp(fresh_norm / pss.spectral_norm(W.flatten(1)), max=1.0)
    return result, False


@dataclass(frozen=True)
class Remedy:
    """One way to go on.

    Args:
        start: "last" (the dead checkpoint), "healthy" (the last one before the death), "back-100", "back-200",
            "scratch" (other fresh weights) or "never" (a run that never met the deadly rate).
        surgery: what is done to the weights.
        reset: whether the optimizer starts anew, whatever the surgery says.
        method: what is done while training on.
        rate: factor on the learning rate.
        deadly: whether a late death goes on at the rate that killed it, as an early one always does.
    """

    start: str = "last"
    surgery: Surgery | None = None
    reset: bool = False
    method: str = "nothing"
    rate: float = 1.0
    deadly: bool = False


REMEDIES: dict[str, Remedy] = {
    "continue": Remedy(),
    "reset-optimizer": Remedy(reset=True),
    "reset-rewarmup": Remedy(reset=True, method="warmup"),
    "halve-lr": Remedy(rate=0.5),
    "back-100": Remedy("back-100"),
    "back-200": Remedy("back-200"),
    "restart": Remedy("scratch", reset=True),
    "restart-guard": Remedy("scratch", reset=True, method="pss-default"),
    "restart-warmup": Remedy("scratch", reset=True, method="warmup"),
    "never": Remedy("never"),
    "msign": Remedy(surgery=repair(strength="gentle", smoothing="equal")),
    "noise": Remedy(surgery=repair(strength="gentle", smoothing="noise")),
    "rescale": Remedy(surgery=rescale),
    "repair": Remedy(surgery=repair()),
    "repair-keep": Remedy(surgery=repair(optimizer="keep")),
    "repair-guard": Remedy(surgery=repair(), method="pss-default"),
    "repair-rewarmup": Remedy(surgery=repair(), method="warmup"),
    "repair-gentle": Remedy(surgery=repair(strength="gentle")),
    "repair-gentle-guard": Remedy(surgery=repair(strength="gentle"), method="pss-default"),
    "repair-deep": Remedy(surgery=repair(strength="deep")),
    "repair-deep-guard": Remedy(surgery=repair(strength="deep"), method="pss-default"),
    "repair-deep-keep": Remedy(surgery=repair(strength="deep", optimizer="keep")),
    "repair-dominant": Remedy(surgery=repair(strength="gentle", edge="dominant")),
    "repair-init": Remedy(surgery=repair(strength="gentle", edge="init")),
}
DEADLY: dict[str, Remedy] = {
    "repair-deadly": Remedy(surgery=repair(), deadly=True),
    "repair-guard-deadly": Remedy(surgery=repair(), method="pss-default", deadly=True),
    "restart-deadly": Remedy("scratch", reset=True, deadly=True),
    "restart-guard-deadly": Remedy("scratch", reset=True, method="pss-default", deadly=True),
}
"""Of late deaths, at the rate that killed."""

CHANGED: dict[str, Remedy] = {
    **{f"deep-scale-{x:g}": Remedy(surgery=with_constant("pss_param.surgery.DEEP_SCALE", x)) for x in (1.0, 1.7)},
    **{f"deep-ends-{x:g}": Remedy(surgery=with_constant("pss_param.surgery.ENDS", x)) for x in (1.0, 1.5)},
    "deep-tables-left": Remedy(surgery=with_constant("pss_param.plan._outside", _no_tables)),
    "deep-no-room": Remedy(surgery=with_constant("pss_param.plan.roomy", lambda targets, infos: frozenset())),
    "deep-clip-init": Remedy(surgery=repair(strength="deep", smoothing="clip", edge="init")),
    "deep-clip-bulk": Remedy(surgery=repair(strength="deep", smoothing="clip", edge="bulk")),
}
"""A deep repair with one thing changed."""

USUAL_REMEDIES = tuple(REMEDIES)
"""Names of what is tried on every dead checkpoint."""

REMEDIES |= {**DEADLY, **CHANGED}


def resume(spec: Spec, past: Dead) -> dict[str, object]:
    """Train on from a checkpoint.

    Args:
        spec: the measurement.
        past: what the dead run left.

    Returns:
        See :func:`suite.training.outcome`; with the held-out loss right at the start.
    """
    task, remedy = tasks()[spec.task], REMEDIES[spec.method]
    if spec.question == "healthy" and remedy.start == "last":
        remedy = replace(remedy, start="healthy")
    before, after, multiple = phases(task, spec.death, spec.dying)
    method, steps = METHODS[remedy.method](), task.steps
    rate = remedy.rate * (multiple if spec.death == "early" or remedy.deadly else 1.0)
    if remedy.start == "never":
        steps, rate = steps + before + after, 1.0
    run = _begin(task, spec, past, remedy, method)
    at_start = evaluate(run.model, task)
    method.start(run.model, run.optimizer, steps)
    trace: Trace = go_on(task, run, method, steps, rate)
    return {**outcome(task, run, trace), "held_out_at_start": round(at_start, 4)}


def _begin(task: Task, spec: Spec, past: Dead, remedy: Remedy, method: Method) -> Run:
    if remedy.start in {"scratch", "never"}:
        return fresh(task, method, spec.seed + (1000 if remedy.start == "scratch" else 0))
    run = fresh(task, method, spec.seed)
    source = _source(past, remedy.start)
    state, anew = source.model, False
    if remedy.surgery is not None:
        state, anew = remedy.surgery(copy.deepcopy(state))
    run.model.load_state_dict(state)
    if not (remedy.reset or anew):
        run.optimizer.load_state_dict(copy.deepcopy(source.optimizer))
    run.stream, run.step = skip(run.stream, past.last.step), past.last.step
    return run


def _source(past: Dead, start: str) -> Saved:
    if start.startswith("back-"):
        return past.back.get(int(start.removeprefix("back-")), past.healthy)
    return past.last if start == "last" else past.healthy
