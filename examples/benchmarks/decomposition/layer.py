# SPDX-License-Identifier: Apache-2.0
"""One layer of Llama-2-7B's shapes, made on the fly with a stable rank near 20."""

from __future__ import annotations

import math
import time
import timeit

import torch
from torch import Tensor

import pss_param as pss

LAYER = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]


def like_trained(m: int, n: int, seed: int) -> Tensor:
    """A Gaussian matrix with 64 directions on top of it that bring the stable rank to about 20."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.randn(size, 64, generator=generator) / math.sqrt(size) for size in (m, n))
    top = math.sqrt(m * n / 17.0)
    return torch.randn(m, n, generator=generator).addmm_(U * (top * torch.arange(1, 65) ** -0.7), V.mT)


def layer(tol: float, threads: int) -> dict[str, object]:
    """One layer of Llama-2-7B: seconds, against reading its bytes once and against the machine's matmul."""
    seconds = reading = 0.0
    rows = []
    side = torch.randn(2048, 2048)
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        side @ side
        rates.append(2 * 2048**3 / (time.perf_counter() - start))
    for seed, (m, n) in enumerate(LAYER):
        W = like_trained(m, n, seed)
        read = min(timeit.repeat(lambda W=W: torch.dot(W.view(-1), W.view(-1)), number=1, repeat=5))
        start = time.perf_counter()
        found = pss.dominant_directions(W, tol=tol)
        spent = time.perf_counter() - start
        seconds, reading = seconds + spent, reading + read
        row = {"shape": f"{m}x{n}", "s": spent, "read_s": read, "k": int(found.k), "sr": float(found.stable_rank)}
        rows.append(row | {"bound": float(found.error), "passes_at_reading_speed": spent / read})
    return {"s": seconds, "read_s": reading, "tol": tol, "threads": threads, "matmul_flops": max(rates), "rows": rows}
