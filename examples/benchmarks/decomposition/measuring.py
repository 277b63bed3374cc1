# SPDX-License-Identifier: Apache-2.0
"""One cell: our time beside that of each rival at its cheapest settings that reach the target."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

import pss_param as pss

from .cases import Case, Triplets
from .methods import full, ours, settings

_HOPELESS = 10.0
"""A rival is given up when a call took so many times our time, and a fifth of a second more, and missed the target."""

_MOST, _ENOUGH = 300, 0.5
"""Short calls are repeated up to so many times, or for so many seconds of ours."""

_ROUNDING = 1e-6
"""Errors below count as this much: float32 has no less to offer."""

_LONG = 1.0
"""Seconds beyond which a call is not repeated."""


def timed(call: Callable[[], Triplets]) -> tuple[float, Triplets]:
    """Seconds of one call, and what it found."""
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


class Missed(NamedTuple):
    """No settings reached the target; the longest call that was tried."""

    seconds: float


class Pick(NamedTuple):
    """The settings that count, and what one call with them took."""

    seconds: float
    call: Callable[[], Triplets]


@dataclass
class Trial:
    """One way of calling a rival, tried once: what misses one target is not tried for a smaller one."""

    made: Case
    call: Callable[[], Triplets]

    @cached_property
    def outcome(self) -> tuple[float, float]:
        """Seconds of one call, and the error of what it found."""
        torch.manual_seed(0)
        seconds, found = timed(self.call)
        return seconds, self.made.error(found)


Trials = dict[str, list[Trial]]


def trials(made: Case) -> Trials:
    """All rivals of one matrix with all their settings, none tried yet."""
    return {name: [Trial(made, call) for call in calls] for name, calls in settings(made).items()}


def cheapest(target: float, tries: list[Trial], ours_s: float) -> Pick | Missed:
    """The fastest of the settings, cheapest first, that reach the target; looks at three that do."""
    reached: list[Pick] = []
    longest = 0.0
    for trial in tries:
        seconds, error = trial.outcome
        longest = max(longest, seconds)
        if error <= target:
            reached.append(Pick(seconds, trial.call))
        if len(reached) == 3 or seconds > _HOPELESS * ours_s + 0.2:
            break
    return min(reached, key=lambda pick: pick.seconds) if reached else Missed(longest)


def measure(made: Case, target: float, repeats: int, rivals: Trials) -> dict[str, object]:
    """Our time, error and bound, and each rival's ratio to our time; the least of interleaved runs counts."""
    timed(lambda: ours(made, target))
    seconds, found = timed(lambda: ours(made, target))
    mine = [seconds]
    tried = {name: cheapest(target, tries, seconds) for name, tries in rivals.items() if tries}
    picks = {name: pick for name, pick in tried.items() if isinstance(pick, Pick)}
    theirs = {name: [pick.seconds] for name, pick in picks.items()}
    for _ in range(max(repeats, min(_MOST, int(_ENOUGH / seconds)))):
        if mine[0] < _LONG:
            mine.append(timed(lambda: ours(made, target))[0])
        for name, times in theirs.items():
            if times[0] < _LONG:
                times.append(timed(picks[name].call)[0])
    return {
        "ms": 1e3 * min(mine),
        "warm_ms": 1e3 * warm_start(made, target, 1 if mine[0] > _LONG else repeats),
        "error": made.error(found),
        "bound": float(pss.dominant_directions(made.W, tol=target).error),
        "k": made.k,
        "ratios": {name: min(times) / min(mine) for name, times in theirs.items()},
        "missed": {name: miss.seconds / min(mine) for name, miss in tried.items() if isinstance(miss, Missed)},
    }


def at_our_error(made: Case, target: float, repeats: int, tries: list[Trial]) -> dict[str, object]:
    """``svd_lowrank`` once more, at the error that ours has instead of the target: its time over ours."""
    timed(lambda: ours(made, target))
    seconds, found = timed(lambda: ours(made, target))
    pick = cheapest(max(made.error(found), _ROUNDING), tries, seconds)
    mine, theirs = [seconds], [pick.seconds]
    for _ in range(max(repeats, min(_MOST, int(_ENOUGH / seconds)))):
        if seconds < _LONG:
            mine.append(timed(lambda: ours(made, target))[0])
        if isinstance(pick, Pick) and pick.seconds < _LONG:
            theirs.append(timed(pick.call)[0])
    return {"ms": 1e3 * min(mine), "ratio": min(theirs) / min(mine), "reached": isinstance(pick, Pick)}


def full_svd(made: Case) -> float:
    """Seconds of one ``torch.linalg.svd``."""
    return timed(lambda: full(made))[0]


def warm_start(made: Case, target: float, repeats: int) -> float:
    """Seconds with the directions of the matrix before a step that moved it by 1 % of its norm."""
    generator = torch.Generator().manual_seed(3)
    step = torch.randn(made.W.shape, generator=generator)
    before = made.W + step * (0.01 * made.W.norm() / step.norm())
    init = pss.dominant_directions(before, made.k + 2, tol=target).Vh.mT
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        pss.dominant_directions(made.W, tol=target, init=init)
        times.append(time.perf_counter() - start)
    return min(times)
