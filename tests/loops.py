# SPDX-License-Identifier: Apache-2.0
"""One training run of the tiny GPT at a rate that kills it, in every kind of loop, with and without a guard.

The rate is 1e-2, 7e-3 where gradients are accumulated. In the plain and in the clipped loop unguarded runs ended above
3.19 nats (seeds 0 to 2; single characters give 3.2), and guarded ones between 2.77 and 3.05 (seeds 0 to 5); the other
loops were run on seed 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import tiny_gpt
import torch
from torch import nn

from pss_param.attaching import attach
from pss_param.guard import Guard

RATE, STEPS = 1e-2, 160
DEAD = ALIVE = 0.98 * tiny_gpt.UNIGRAM
"""What a dead run stays above and a living one gets below, by the definition of the benchmarks' suite."""


@dataclass(frozen=True)
class Loop:
    """What a loop does besides forward, backward and step; ``watch`` guards it without a line in it."""

    bf16: bool = False
    scaler: bool = False
    accumulate: int = 1
    recompute: bool = False
    clip: bool = True
    watch: bool = False
    backend: str = ""
    rate: float = RATE


LOOPS = {
    "plain": Loop(clip=False),
    "clipped": Loop(),
    "autocast bf16": Loop(bf16=True),
    "scaler": Loop(scaler=True),
    "accumulation": Loop(accumulate=2, rate=7e-3),
    "checkpointing": Loop(recompute=True),
    "all of it": Loop(bf16=True, scaler=True, accumulate=2, recompute=True, rate=7e-3),
    "watched": Loop(clip=False, watch=True),
    "compiled": Loop(backend="inductor"),
}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Sums of several threads come in other orders; whether a run dies should not depend on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)  # also where a test is skipped inside


def run(loop: Loop, guarded: bool, seed: int = 0, steps: int = STEPS) -> float:
    """Train, and return the mean loss of the last twenty steps."""
    model = tiny_gpt.build(seed, recompute=loop.recompute)
    optimizer = torch.optim.AdamW(model.parameters(), lr=loop.rate)
    guard = attach(model) if guarded else None
    if guard is not None and loop.watch:
        guard.watch(optimizer)
    call = torch.compile(model, fullgraph=True, backend=loop.backend) if loop.backend else model
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=loop.scaler)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        losses.append(_backward(call, loop, scaler, seed * steps + step))
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0) if loop.clip else None
        if guard is not None and not loop.watch:
            guard.step(norm)
        scaler.step(optimizer)
        scaler.update()
    return tiny_gpt.mean_of_last(losses)


def _backward(call: nn.Module, loop: Loop, scaler: torch.amp.GradScaler, step: int) -> float:
    size, whole = tiny_gpt.Size(batch=tiny_gpt.Size().batch // loop.accumulate), 0.0
    for part in range(loop.accumulate):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=loop.bf16):
            loss = tiny_gpt.loss_of(call, step * loop.accumulate + part, size) / loop.accumulate
        scaler.scale(loss).backward()
        whole += loss.item()
    return whole


def on_ranks(
    guarded: bool,
    shares: tuple[int, int],
    wrap: Callable[[nn.Module], nn.Module],
    steps: int = STEPS,
) -> tuple[float, Guard | None, nn.Module]:
    """Train one rank's share of the same batches, wrapped for its stack; the loss is that of the share."""
    model = tiny_gpt.build()
    wrapped = wrap(model)
    guard = attach(wrapped) if guarded else None
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=RATE)
    losses, rows = [], slice(shares[1] * 8 // shares[0], (shares[1] + 1) * 8 // shares[0])
    for step in range(steps):
        optimizer.zero_grad()
        inputs, targets = (part[rows] for part in tiny_gpt.batch(step))
        loss = nn.functional.cross_entropy(wrapped(inputs).float().flatten(0, 1), targets.flatten())
        loss.backward()
        if guard is not None:
            guard.step()
        optimizer.step()
        losses.append(loss.item())
    return tiny_gpt.mean_of_last(losses), guard, wrapped
