# SPDX-License-Identifier: Apache-2.0
"""Range, deaths and rescues of one large network; the suite's loop, methods and definition of death."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from suite.methods import METHODS
from suite.store import origin
from suite.task import Task
from suite.training import Run, evaluate, fresh, go_on, outcome, skip, train

from .network import GPT2

OTHER_SEEDS = 1000
"""Added to the seed for the fresh weights of a restart."""


@dataclass(frozen=True)
class Way:
    """One way to go on after a death.

    Args:
        start: "dead", one of :data:`REPAIRS`, "scratch" or "healthy" (late deaths: before the rate was raised).
        method: what is done while training on.
    """

    start: str
    method: str = "nothing"


REPAIRS = {"repaired": (), "tables-left": ("--exclude", "*wte*")}
"""Arguments of the command; the second leaves the table of tokens, which is the head as well, and its places."""

WAYS = {
    "continue": Way("dead"),
    "repair": Way("repaired"),
    "repair-guard": Way("repaired", "pss-default"),
    "repair-tables-left": Way("tables-left"),
    "repair-tables-left-guard": Way("tables-left", "pss-default"),
    "restart": Way("scratch"),
    "restart-guard": Way("scratch", "pss-default"),
    "roll-back": Way("healthy"),
    "roll-back-guard": Way("healthy", "pss-default"),
}


def at_rate(task: Task, method: str, multiple: float, seed: int) -> dict[str, object]:
    """Train from scratch at a multiple of the task's rate."""
    run, trace = train(task, METHODS[method](), seed, task.steps, multiple)
    return outcome(task, run, trace)


class Death:
    """A checkpoint in the layout of a Hugging Face ``Trainer``, dead, and what `pss-repair` makes of it.

    Args:
        task: network, text and rates.
        kind: "early" or "late".
        seed: of weights and batches.
        folder: where the checkpoints are written.
    """

    def __init__(self, task: Task, kind: str, seed: int, folder: Path) -> None:
        self.task, self.kind, self.seed, self.folder = task, kind, seed, folder
        method, self.healthy = METHODS["nothing"](), None
        run = fresh(task, method, seed)
        method.start(run.model, run.optimizer, task.steps + task.kill_steps)
        if kind == "late":
            go_on(task, run, method, task.steps)
            self.healthy = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict(), run.step))
        self.deadly = (task.kill_lr if kind == "late" else task.early_lr) / task.lr
        trace = go_on(task, run, method, task.kill_steps if kind == "late" else task.steps, self.deadly)
        self.step, self.held_out = run.step, evaluate(run.model, task)
        self.final, self.dead = trace.final, trace.dead(task.trivial)
        self._save(run)

    def repair(self, name: str = "repaired") -> dict[str, object]:
        """Run the command, and say how long that took and what it printed last."""
        began, dead, out = time.perf_counter(), str(self.folder / "dead"), str(self.folder / name)
        command = [sys.executable, "-m", "pss_param", dead, "-o", out, *REPAIRS[name]]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=self.folder)
        return {"seconds": round(time.perf_counter() - began, 2), "lines": done.stdout.strip().splitlines()[-6:]}

    def go_on(self, way: Way) -> dict[str, object]:
        """Train on: a late death at the healthy rate, an early one at the rate that killed it."""
        method = METHODS[way.method]()
        run = self._begun(way, method)
        began = evaluate(run.model, self.task)
        method.start(run.model, run.optimizer, self.task.steps)
        trace = go_on(self.task, run, method, self.task.steps, self.deadly if self.kind == "early" else 1.0)
        return {**outcome(self.task, run, trace), "held_out_at_start": round(began, 4)}

    def _save(self, run: Run) -> None:
        folder = self.folder / "dead"
        run.model.save_pretrained(folder)
        torch.save(run.optimizer.state_dict(), folder / "optimizer.pt")

    def _begun(self, way: Way, method: object) -> Run:
        if way.start in REPAIRS and not (self.folder / way.start).exists():
            self.repair(way.start)
        run = fresh(self.task, method, self.seed + OTHER_SEEDS * (way.start == "scratch"))
        if way.start == "scratch":
            return run
        if way.start == "healthy":
            weights, moments, _ = self.healthy
        else:
            folder = self.folder / way.start
            weights = GPT2.from_pretrained(folder).state_dict()
            moments = torch.load(folder / "optimizer.pt", weights_only=True)
        run.model.load_state_dict(weights)
        run.optimizer.load_state_dict(copy.deepcopy(moments))
        run.stream, run.step = skip(run.stream, self.step), self.step
        return run


def rescues(task: Task, found: dict[str, object], ways: list[str], seed: int, save: Callable[[], None]) -> None:
    """One death and every way to go on after it that is not there yet.

    Args:
        task: network, text and rates.
        found: what is known of this death, its kind at least; filled.
        ways: names in :data:`WAYS`.
        seed: of weights and batches.
        save: called whenever there is more.
    """
    kind, known = found["kind"], found.setdefault("ways", {})
    missing = [name for name in ways if name not in known and (kind == "late" or WAYS[name].start != "healthy")]
    if not missing:
        return
    folder = Path(tempfile.mkdtemp())
    try:
        death = Death(task, kind, seed, folder)
        if not known:  # a GPU kills a little differently each time; what is told is the first death
            found |= {"dead": death.dead, "final": death.final, "held_out": death.held_out}
        if not known or any(WAYS[name].start == "repaired" for name in missing):  # and the newest repair
            found["repair"] = death.repair()
        for name in missing:
            known[name] = death.go_on(WAYS[name]) | {"commit": origin()["commit"]}
            save()
    finally:
        shutil.rmtree(folder)
