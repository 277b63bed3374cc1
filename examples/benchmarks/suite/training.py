# SPDX-License-Identifier: Apache-2.0
"""The one training loop of the suite, and the one definition of a dead run.

A run is *dead* when a loss is not finite, or when the mean training loss of its last 50 steps is not below 0.98 of
the task's trivial loss: that of the best constant prediction (the unigram entropy of the text, the entropy of the
classes). It *learns* otherwise.
"""

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

import pss_param as pss
from suite.methods.base import Method
from suite.optimizers import make_optimizer
from suite.task import Task, evaluate

DEAD = 0.98
LAST = 50


@dataclass
class Run:
    """A training under way, or what is left of it: everything that a checkpoint holds.

    Args:
        model: the network.
        optimizer: its optimizer.
        stream: where the batches come from.
        step: steps done.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    stream: Iterator[object]
    step: int = 0


@dataclass
class Trace:
    """What was seen while training.

    Args:
        losses: training loss of every step, in nats.
        interventions: steps at which the method did something.
        held: how many of these were no triggers: :attr:`suite.methods.base.Method.held`.
        seconds: processor time of the loop.
    """

    losses: list[float] = field(default_factory=list)
    interventions: list[int] = field(default_factory=list)
    held: int = 0
    seconds: float = 0.0

    @property
    def final(self) -> float:
        """Mean loss of the last 50 steps.

        Returns:
            Nats; NaN for a run that blew up.
        """
        return sum(self.losses[-LAST:]) / len(self.losses[-LAST:])

    def dead(self, trivial: float) -> bool:
        """Whether the run is dead, by the definition above.

        Args:
            trivial: loss of the best constant prediction.

        Returns:
            The verdict.
        """
        return not self.final < DEAD * trivial

    def death(self, trivial: float) -> int | None:
        """When the loss left the ground it had won for good.

        Args:
            trivial: loss of the best constant prediction.

        Returns:
            The first step from which on the mean of 20 steps stays at 0.98 of the trivial loss or above; None if alive.
        """
        if not self.dead(trivial):
            return None
        means = [sum(self.losses[i : i + 20]) / len(self.losses[i : i + 20]) for i in range(len(self.losses))]
        alive = [i for i, mean in enumerate(means) if mean < DEAD * trivial]
        return alive[-1] + 1 if alive else 0


def fresh(task: Task, method: Method, seed: int) -> Run:
    """Begin a run.

    Args:
        task: what is learnt.
        method: what is done about divergence; may change the model before the optimizer exists.
        seed: of the weights and of the data.

    Returns:
        The run at step 0; the global random state is what it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = task.build()
        method.prepare(model)
    optimizer = make_optimizer(task.optimizer, model, task.lr, **method.optimizer_options())
    return Run(model, optimizer, task.batches(seed))


def go_on(task: Task, run: Run, method: Method, steps: int, multiple: float = 1.0) -> Trace:
    """Train.

    Args:
        task: what is learnt.
        run: where to start; moves on.
        method: what is done about divergence; started by the caller.
        steps: how many; a loss that is not finite ends it.
        multiple: learning rate as a multiple of the task's.

    Returns:
        The trace of these steps.
    """
    trace, start = Trace(), time.process_time()
    run.model.train()
    for step in range(steps):
        before = method.events
        try:
            trace.losses.append(_step(run, method, step, multiple))
        except pss.NonFiniteError:  # the guard gives up on gradients that stay non-finite: a death like any other
            trace.losses.append(math.nan)
        if method.events > before:
            trace.interventions.append(step)
        if not math.isfinite(trace.losses[-1]):
            break
    trace.seconds, trace.held = time.process_time() - start, method.held
    return trace


def _step(run: Run, method: Method, step: int, multiple: float) -> float:
    for group in run.optimizer.param_groups:
        group["lr"] = group["base_lr"] * multiple * method.lr_scale(step)
    run.optimizer.zero_grad(set_to_none=True)
    loss = run.model.loss(next(run.stream))
    penalty = method.penalty()
    (loss if penalty is None else loss + penalty).backward()
    value = float(loss.detach())
    if math.isfinite(value) and method.before_step(step, value):
        run.optimizer.step()
    method.after_step(step)
    run.step += 1
    return value


def train(task: Task, method: Method, seed: int, steps: int, multiple: float = 1.0) -> tuple[Run, Trace]:
    """Train from scratch.

    Args:
        task: what is learnt.
        method: what is done about divergence.
        seed: of the weights and of the data.
        steps: how many.
        multiple: learning rate as a multiple of the task's.

    Returns:
        The run at its end, and its trace.
    """
    run = fresh(task, method, seed)
    method.start(run.model, run.optimizer, steps)
    return run, go_on(task, run, method, steps, multiple)


def outcome(task: Task, run: Run, trace: Trace) -> dict[str, object]:
    """What is kept of a run.

    Args:
        task: what was learnt.
        run: the run at its end.
        trace: its trace.

    Returns:
        Plain numbers: final and held-out loss, the verdict, interventions, seconds and a curve of means of ten steps.
    """
    tens = [trace.losses[i : i + 10] for i in range(0, len(trace.losses), 10)]
    return {
        "final": _plain(trace.final),
        "held_out": _plain(evaluate(run.model, task)),
        "dead": trace.dead(task.trivial),
        "death": trace.death(task.trivial),
        "steps": len(trace.losses),
        "events": len(trace.interventions),
        "held": trace.held,
        "first_event": trace.interventions[0] if trace.interventions else None,
        "seconds": round(trace.seconds, 3),
        "curve": [_plain(sum(ten) / len(ten)) for ten in tens],
        "trivial": _plain(task.trivial),
    }


def _plain(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def skip(stream: Iterator[object], count: int) -> Iterator[object]:
    """Move a stream on, as a resumed run does.

    Args:
        stream: batches.
        count: how many were seen already.

    Returns:
        The stream behind them.
    """
    return itertools.islice(stream, count, None)
