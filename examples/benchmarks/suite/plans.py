# SPDX-License-Identifier: Apache-2.0
"""Which runs answer which question, most important first: a suite that is cut short has whole answers to some."""

import functools
from collections.abc import Iterator

from suite.methods import METHODS
from suite.remedies import REMEDIES
from suite.spec import Spec
from suite.task import tasks

GRID = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Learning rates, as multiples of the task's own."""

HEADLINE = (
    "nothing",
    "pss-default",
    "pss-published",
    "clip-1.0",
    "warmup",
    "zclip",
    "spectral-norm",
    "sigma-reparam",
)
"""Methods that the README shows."""

RIVALS = (
    *HEADLINE,
    "skip-6sigma",
    "halve-lr",
    "no-weight-decay",
    "orthogonal",
    "qk-norm",
    "qk-clip",
    "msign",
    "msign-100",
    "pss-floor",
    "pss-bulk",
    "pss-init",
    "pss-softplus",
    "pss-log",
    "pss-softmax",
    "pss-convolution",
)
"""Methods of the first table."""

CORE = (
    "continue",
    "repair",
    "repair-reset",
    "repair-guard",
    "repair-gentle",
    "repair-deep",
    "restart",
    "never",
    "back-100",
    "reset-rewarmup",
    "halve-lr",
    "msign",
)
"""Remedies that every dead checkpoint meets first."""

ABLATION_TASKS = ("gpt-postln-adamw", "gpt-preln-adamw", "mlp-adamw")
ABLATION_GRID = (1.0, 8.0, 16.0)
DYING = (10, 20, 40, 80, 160, 320)
RECOVERY = ("continue", "repair", "repair-reset", "restart", "never", "back-100")


def ranges(names: tuple[str, ...], methods: tuple[str, ...], seeds: range, grid: tuple[float, ...]) -> Iterator[Spec]:
    """Question 1: which learning rates learn.

    Args:
        names: tasks.
        methods: methods.
        seeds: seeds, the outermost loop.
        grid: multiples of the learning rate.

    Yields:
        Spec: one run.
    """
    for seed in seeds:
        for method in methods:
            for task in names:
                if fits(task, method):
                    yield from (Spec("range", task, method, seed, multiple) for multiple in grid)


@functools.cache
def fits(task: str, method: str) -> bool:
    """Whether a method says anything about a network: clipping of attention logits does not about a perceptron.

    Args:
        task: its name.
        method: its name.

    Returns:
        The answer.
    """
    return METHODS[method]().fits(tasks()[task].build())


def rescues(
    names: tuple[str, ...], remedies: tuple[str, ...], seeds: range, dying: tuple[int, ...] = (0,)
) -> Iterator[Spec]:
    """Question 2: what becomes of a dead checkpoint.

    Args:
        names: tasks.
        remedies: what is tried.
        seeds: seeds, the outermost loop.
        dying: steps at the deadly rate; other than the usual only for late deaths.

    Yields:
        Spec: one run.
    """
    for seed in seeds:
        for task in names:
            for steps in dying:
                for death in ("late", "early") if steps == 0 else ("late",):
                    for remedy in remedies:
                        yield Spec("rescue", task, remedy, seed, 1.0, death, steps)


def healthy(names: tuple[str, ...], seeds: range) -> Iterator[Spec]:
    """What a repair does to a checkpoint that needs none.

    Args:
        names: tasks.
        seeds: seeds.

    Yields:
        Spec: one run.
    """
    for seed in seeds:
        for task in names:
            for remedy in ("continue", "repair", "repair-gentle", "repair-deep"):
                yield Spec("healthy", task, remedy, seed, 1.0, "late")


def quick() -> list[Spec]:
    """What can be answered in a quarter of an hour on two cores.

    Returns:
        The runs.
    """
    some = ("gpt-postln-adamw", "vit-adamw", "mlp-adamw", "lstm-adamw")
    remedies = ("continue", "repair", "repair-reset", "restart", "never", "back-100")
    return [*rescues(some, remedies, range(2)), *ranges(some, HEADLINE[:5], range(1), GRID), *healthy(some, range(1))]


def full() -> list[Spec]:
    """Everything.

    Returns:
        The runs: the headline questions on three seeds, then everything else seed by seed.
    """
    names = tuple(tasks())
    ablations = tuple(name for name in METHODS if name not in RIVALS)
    runs = [*rescues(names, CORE, range(1)), *ranges(names, HEADLINE, range(1), GRID), *healthy(names, range(1))]
    runs += [*rescues(names, CORE, range(1, 3)), *rescues(ABLATION_TASKS, RECOVERY, range(1), DYING)]
    runs += ranges(names, HEADLINE, range(1, 3), GRID)
    for seed in range(3):
        only = range(seed, seed + 1)
        runs += ranges(names, RIVALS, only, GRID)
        runs += ranges(ABLATION_TASKS, ablations, only, ABLATION_GRID)
        runs += rescues(names, tuple(REMEDIES), only)
        runs += rescues(ABLATION_TASKS, RECOVERY, only, DYING)
        runs += healthy(names, only)
    return list(dict.fromkeys(runs))


PROFILES = {"quick": quick, "full": full}
