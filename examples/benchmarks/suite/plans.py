# SPDX-License-Identifier: Apache-2.0
"""Which runs answer which question, most important first: a suite that is cut short has whole answers to some."""

import functools
from collections.abc import Iterator

from suite.methods import METHODS
from suite.methods.guarded import DEFAULTS
from suite.ranges import FURTHER, GRID, LOW, largest
from suite.records import Records
from suite.remedies import CHANGED, DEADLY, USUAL_REMEDIES
from suite.rescues import USUAL
from suite.spec import Spec
from suite.states import HEALTHY, KILLED, ON_THE_WAY
from suite.task import tasks

HEADLINE = (
    "nothing",
    "pss-default",
    "pss-published",
    "pss-undamped",
    "pss-dominant",
    "pss-always-init",
    "clip-1.0",
    "warmup",
    "zclip",
    "spectral-norm",
    "sigma-reparam",
)
"""Methods that the README shows, where they were measured on every network."""

QUICK = ("nothing", "pss-default", "pss-published", "pss-always-init", "clip-1.0")
"""Methods of the quick profile."""

RIVALS = (
    *HEADLINE,
    "skip-6sigma",
    "halve-lr",
    "no-weight-decay",
    "orthogonal",
    "qk-norm",
    "qk-clip",
    "msign",
    "pss-dominant-undamped",
)
"""Methods of the first table; the others change one part of the published one, and are measured on
:data:`ABLATION_TASKS`."""

CORE = (
    "continue",
    "repair",
    "repair-guard",
    "repair-gentle",
    "restart",
    "restart-guard",
    "never",
    "back-100",
    "reset-rewarmup",
    "halve-lr",
    "msign",
)
"""Remedies that every dead checkpoint meets first."""

ABLATION_TASKS = ("gpt-postln-adamw", "gpt-preln-adamw", "mlp-adamw")
ABLATION_GRID = (1.0, 8.0, 16.0)
DEFAULT_TASKS = (*ABLATION_TASKS, "lstm-adamw")
DEFAULT_GRID = (1.0, 32.0)
"""Where the default is measured with one thing changed: it learns at higher rates than the published method."""

CHEAP = ("cnn-sgd", "mlp-adamw", "mlp-sgd", "lstm-adamw")
"""Networks that train in a second or two: five seeds."""
DYING = (10, 20, 40, 80, 160, 320)
RECOVERY = ("continue", "repair", "restart", "never", "back-100")


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


def further(records: Records) -> list[Spec]:
    """The next rate for every method that learns at the last one that it was asked for.

    Args:
        records: all results.

    Returns:
        One run a seed; nothing where :data:`FURTHER` is exhausted.
    """
    runs = []
    for task in records.values("task", question="range"):
        for method in records.values("method", question="range", task=task):
            found = records.find(question="range", task=task, method=method)
            last = max(spec.multiple for spec in found)
            beyond = [multiple for multiple in FURTHER if multiple > last]
            if beyond and last >= GRID[-1] and largest(records, task, method) == last:
                seeds = sorted({spec.seed for spec in found})
                runs += [Spec("range", task, method, seed, beyond[0]) for seed in seeds]
    return runs


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


def states(names: tuple[str, ...], seeds: range, dying: tuple[int, ...] = (0,)) -> Iterator[Spec]:
    """What a repair judges by, in health and after a death.

    Args:
        names: tasks.
        seeds: seeds.
        dying: steps at the deadly rate; other than the usual only for late deaths.

    Yields:
        Spec: one look.
    """
    for seed in seeds:
        for task in names:
            for steps in dying:
                if steps == 0:
                    yield Spec("state", task, HEALTHY, seed, 1.0, "late")
                    yield Spec("state", task, KILLED, seed, 1.0, "late")
                    yield Spec("state", task, KILLED, seed, 1.0, "early")
                else:
                    yield Spec("state", task, KILLED, seed, 1.0, "late", steps)


def quick() -> list[Spec]:
    """What can be answered in a quarter of an hour on two cores.

    Returns:
        The runs.
    """
    some = ("gpt-postln-adamw", "vit-adamw", "mlp-adamw", "lstm-adamw")
    return [*rescues(some, RECOVERY, range(2)), *ranges(some, QUICK, range(1), GRID), *healthy(some, range(1))]


def late(names: tuple[str, ...], remedies: tuple[str, ...], seeds: range) -> Iterator[Spec]:
    """What is tried on late deaths alone.

    Args:
        names: tasks.
        remedies: what is tried.
        seeds: seeds.

    Yields:
        Spec: one run; of each checkpoint first the one that shows whether it is dead.
    """
    yield from (spec for spec in rescues(names, ("continue", *remedies), seeds) if spec.death == "late")


def full() -> list[Spec]:
    """Everything.

    Returns:
        The runs: the headline questions on three seeds, then everything else seed by seed.
    """
    names = tuple(tasks())
    ablations = tuple(name for name in METHODS if name not in (*RIVALS, *DEFAULTS))
    runs = [*rescues(names, CORE, range(1), USUAL), *ranges(names, HEADLINE, range(1), GRID)]
    runs += [*healthy(names, range(1)), *rescues(names, CORE, range(1, 3), USUAL)]
    runs += [*rescues(ABLATION_TASKS, RECOVERY, range(1), DYING), *ranges(names, HEADLINE, range(1, 3), GRID)]
    for seed in range(3):
        only = range(seed, seed + 1)
        runs += ranges(names, ("nothing", "pss-default"), only, LOW)
        runs += ranges(names, RIVALS, only, GRID)
        runs += ranges(ABLATION_TASKS, ablations, only, ABLATION_GRID)
        runs += ranges(DEFAULT_TASKS, tuple(DEFAULTS), only, DEFAULT_GRID)
        runs += late(names, (*DEADLY, *CHANGED), only)
        runs += rescues(names, USUAL_REMEDIES, only)
        runs += rescues(ABLATION_TASKS, RECOVERY, only, DYING)
        runs += healthy(names, only)
    runs += [*rescues(CHEAP, CORE, range(3, 5), USUAL), *ranges(CHEAP, HEADLINE, range(3, 5), (*LOW, *GRID))]
    runs += [*states(names, range(3)), *states(CHEAP, range(3, 5)), *states(ABLATION_TASKS, range(3), ON_THE_WAY)]
    return list(dict.fromkeys([*runs, *healthy(CHEAP, range(3, 5))]))


PROFILES = {"quick": quick, "full": full}
