# SPDX-License-Identifier: Apache-2.0
r"""The acts of the demo: learn, die, repair, and three ways to go on.

The dead run, the repaired one and the restart go on for the same number of steps, at the same learning rate,
with a fresh optimizer, on the same batches in the same order. What they reach is measured on text that no run
has seen; :mod:`.demo_verdict` compares it.
"""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.optim import AdamW

from pss_param.repair import repair_checkpoint

from .demo_model import CharacterTransformer
from .demo_text import ALPHABET, Text

Advance = Callable[[str, int, float], None]
"""Told of every step: the act, the step within it, its training loss."""

# Note [Where death begins]
# A run is resumed without its optimizer state, at ten times the healthy rate: fresh AdamW takes a full step in
# every weight at once. Six such steps are sometimes survived (the control comes back by itself); ten kill, and
# leave most of what was learned. At 2e-2 the damage is so deep that some seeds never come back.


@dataclass(frozen=True)
class Recipe:
    r"""Everything that decides the outcome.

    Args:
        seed: of the weights and the batches.
        steps: of healthy training; each of the three runs after the death gets a third of it.
        rate: the healthy learning rate.
        kill_steps: steps at the rate that kills.
        kill_rate: that rate.
        batch: windows per step.
        context: characters per window.
        width: size of the residual stream.
        layers: number of blocks.
        heads: attention heads per block.
    """

    seed: int = 0
    steps: int = 600
    rate: float = 1e-3
    kill_steps: int = 10
    kill_rate: float = 1e-2
    batch: int = 12
    context: int = 64
    width: int = 96
    layers: int = 6
    heads: int = 4

    @property
    def resume_steps(self) -> int:
        r"""Steps of each of the three runs after the death."""
        return max(1, self.steps // 3)

    @property
    def total_steps(self) -> int:
        r"""Steps of all acts together."""
        return self.steps + self.kill_steps + 3 * self.resume_steps

    def generator(self, stream: int) -> torch.Generator:
        r"""Make a source of randomness of its own.

        Args:
            stream: 0 for the first life, 1 for what comes after the death.

        Returns:
            A generator that depends on the seed and the stream alone.
        """
        return torch.Generator().manual_seed(2 * self.seed + stream)

    def network(self, stream: int = 0) -> CharacterTransformer:
        r"""Make an untrained network; the global random state stays as it is.

        Args:
            stream: 0 for the first life, 1 for the restart.

        Returns:
            The network.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2 * self.seed + stream)
            return CharacterTransformer(len(ALPHABET), self.width, self.layers, self.heads, self.context)


@dataclass(frozen=True)
class Act:
    r"""What one act came to.

    Args:
        loss: on the held-out text at its end, in nats per character.
        stable_rank: median over the matrices inside the blocks, dimensionless.
        seconds: it took.
        curve: training loss of each step; empty for the repair.
    """

    loss: float
    stable_rank: float
    seconds: float
    curve: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Stage:
    r"""What all acts share.

    Args:
        recipe: the numbers.
        text: what is learned.
        folder: takes the checkpoints.
        advance: told of every step.
    """

    recipe: Recipe
    text: Text
    folder: Path
    advance: Advance

    def path(self, act: str) -> Path:
        r"""Where an act leaves its network.

        Args:
            act: its name.

        Returns:
            The checkpoint's path.
        """
        return self.folder / f"{act}.safetensors"

    def load(self, act: str) -> CharacterTransformer:
        r"""Read the network that an act has left.

        Args:
            act: its name.

        Returns:
            The network.
        """
        network = self.recipe.network()
        network.load_state_dict(load_file(self.path(act)))
        return network

    def train(self, act: str, network: CharacterTransformer, pace: "Pace") -> Act:
        r"""Train with a fresh optimizer, save and measure.

        Args:
            act: name of the act and of its checkpoint.
            network: trained in place.
            pace: how long and how fast.

        Returns:
            The outcome.
        """
        start, curve = time.perf_counter(), []
        optimizer = AdamW(network.parameters(), pace.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        for step in range(pace.steps):
            windows = self.text.batch(self.recipe.batch, self.recipe.context, pace.batches)
            loss = network.loss(*windows)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            curve.append(loss.item())
            self.advance(act, step + 1, curve[-1])
        save_file(network.state_dict(), self.path(act), metadata={"format": "pt"})
        return self.measure(network, start, curve)

    @torch.no_grad()
    def measure(self, network: CharacterTransformer, start: float, curve: list[float]) -> Act:
        r"""Measure a network at the end of an act.

        Args:
            network: left as it is.
            start: when the act began, by :func:`time.perf_counter`.
            curve: its training losses.

        Returns:
            The outcome.
        """
        loss = float(network.loss(*self.text.exam(self.recipe.context)))
        return Act(loss, network.stable_rank(), time.perf_counter() - start, tuple(curve))


@dataclass(frozen=True)
class Pace:
    r"""How an act trains.

    Args:
        steps: how many.
        rate: learning rate.
        batches: draws them.
    """

    steps: int
    rate: float
    batches: torch.Generator


def play(recipe: Recipe, text: Text, folder: Path, advance: Advance) -> dict[str, Act]:
    r"""Play all acts.

    Args:
        recipe: the numbers.
        text: what is learned.
        folder: takes the checkpoints.
        advance: told of every step.

    Returns:
        The acts by name: ``healthy``, ``dead``, ``dead.repaired``, ``control``, ``restart``, ``rescued``.
    """
    stage = Stage(recipe, text, folder, advance)
    with few_threads():
        acts = _live_and_die(stage)
        acts["dead.repaired"] = _repair(stage)
        for act, network in (
            ("control", stage.load("dead")),
            ("restart", recipe.network(1)),
            ("rescued", stage.load("dead.repaired")),
        ):
            pace = Pace(recipe.resume_steps, recipe.rate, recipe.generator(1))
            acts[act] = stage.train(act, network, pace)
    return acts


def _live_and_die(stage: Stage) -> dict[str, Act]:
    recipe, network, batches = stage.recipe, stage.recipe.network(), stage.recipe.generator(0)
    healthy = stage.train("healthy", network, Pace(recipe.steps, recipe.rate, batches))
    dead = stage.train("dead", network, Pace(recipe.kill_steps, recipe.kill_rate, batches))
    return {"healthy": healthy, "dead": dead}


def _repair(stage: Stage) -> Act:
    start = time.perf_counter()
    repair_checkpoint(stage.path("dead"), stage.path("dead.repaired"))
    return stage.measure(stage.load("dead.repaired"), start, [])


@contextmanager
def few_threads(most: int = 2) -> Generator[None, None, None]:
    r"""Compute with few threads while the block runs: on matrices this small, more are slower.

    Args:
        most: threads at most.

    Yields:
        None: nothing.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, most))
    try:
        yield
    finally:
        torch.set_num_threads(before)
