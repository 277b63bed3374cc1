# SPDX-License-Identifier: Apache-2.0
"""All block matrices of Llama-2-7B's shapes on one GPU, made on the fly with a stable rank near 20, in float32."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import pss_param as pss

LAYERS = 32
SHAPES = {(4096, 4096): 4 * LAYERS, (11008, 4096): 2 * LAYERS, (4096, 11008): LAYERS}


def like_trained(count: int, m: int, n: int, seed: int) -> Tensor:
    """Gaussian matrices with 64 directions on top of each that bring the stable rank to about 20, on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    U, V = (torch.randn(count, size, 64, generator=generator, device="cuda") / math.sqrt(size) for size in (m, n))
    strengths = math.sqrt(m * n / 17.0) * torch.arange(1, 65, device="cuda") ** -0.7
    return torch.randn(count, m, n, generator=generator, device="cuda").baddbmm_(U * strengths, V.mT)


def seconds(call: Callable[[], object], repeats: int = 3) -> float:
    """The least wall-clock time of some calls, each from an idle device to an idle device."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def true_error(W: Tensor, found: pss.DominantDirections, index: int) -> float:
    """Error of one clipped matrix over its norm, from a float64 decomposition of its Gram matrix."""
    k, wide = int(found.k[index]), W[index].double()
    wide = wide if wide.shape[0] >= wide.shape[1] else wide.mT
    values, V = torch.linalg.eigh(wide.mT @ wide)
    S, V = values.flip(0).sqrt(), V.flip(1)[:, :k]
    exact = (wide @ V) * ((S[:k] - S[k]) / S[:k]) @ V.mT
    U, d, Vh = (part[index].double() for part in (found.U, found.S - found.edge[..., None], found.Vh))
    ours = (U[:, :k] * d[:k].clamp_min(0)) @ Vh[:k]
    ours = ours if W.shape[1] >= W.shape[2] else ours.mT
    return float((exact - ours).norm() / wide.norm())


def one_shape(m: int, n: int, count: int, tol: float) -> dict[str, object]:
    """All matrices of one shape: time, work, and whether the answers are right."""
    W = like_trained(count, m, n, seed=m)
    pss.dominant_directions(W[:16], tol=tol)  # libraries load their kernels
    spent = seconds(lambda: pss.dominant_directions(W, tol=tol))
    with FlopCounterMode(display=False) as counter:
        found = pss.dominant_directions(W, tol=tol)
    return {
        "shape": f"{m}x{n}", "count": count, "s": spent, "read_s": seconds(lambda: torch.linalg.vector_norm(W)),
        "flops": counter.get_total_flops(), "k": [int(found.k.min()), int(found.k.max())],
        "stable_rank": float(found.stable_rank.mean()), "bound": float(found.error.max()),
        "converged": bool(found.converged.all()), "error": max(true_error(W, found, i) for i in (0, count - 1)),
    }  # fmt: skip


def matmul_rate() -> float:
    """Operations per second of a product of 8192 x 8192 float32 matrices in full precision."""
    side = torch.randn(8192, 8192, device="cuda")
    side @ side
    return 2 * 8192**3 / seconds(lambda: side @ side)


def model(tol: float) -> dict[str, object]:
    """All shapes, one after the other."""
    rows = [one_shape(m, n, count, tol) for (m, n), count in SHAPES.items()]
    total, work = (sum(row[key] for row in rows) for key in ("s", "flops"))
    rate = matmul_rate()
    return {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "tol": tol, "s": total,
        "read_s": sum(row["read_s"] for row in rows), "matmul_flops": rate, "roofline_share": work / total / rate,
        "rows": rows,
    }  # fmt: skip
