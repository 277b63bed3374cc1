# SPDX-License-Identifier: Apache-2.0
"""Time to smooth one matrix: ours against the ways a user would reach for, at equal or smaller measured error.

Every cell is a shape, a spectrum and an error target. Matrices have known singular vectors, so the error of the
smoothed matrix is measured exactly. Each rival gets ``k`` for nothing and the cheapest settings that reach the target,
found by trying; ours gets the target as ``tol`` and finds ``k`` itself. Runs of a cell are interleaved; the least of
each counts.

Further rows, with ``--layer``: one layer of Llama-2-7B's shapes, made on the fly with a stable rank near 20. Every
cell also says what the same call costs with the directions of a matrix a little earlier as ``init``.

    python examples/benchmarks/spectra.py --shapes 512x512,2048x2048 --layer
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pss_param as pss

RESULTS = Path(__file__).parent / "results" / "spectra.json"
SPECTRA = ("power 0.5", "power 1", "trained", "collapsed", "flat")
Triplets = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A float32 matrix with its exact float64 decomposition."""

    W: Tensor
    U: Tensor
    S: Tensor
    V: Tensor

    @property
    def k(self) -> int:
        """The published number of dominant values."""
        return math.floor(float((self.S / self.S[0]).square().sum()))

    def error(self, found: Triplets) -> float:
        """Error of the smoothed matrix over the matrix's norm, from the factors alone."""
        U, d, V = found
        exact = self.S[: self.k] - self.S[self.k]
        left = torch.linalg.qr(torch.cat([self.U[:, : self.k], U.double()], dim=1)).R
        right = torch.linalg.qr(torch.cat([self.V[:, : self.k], V.double()], dim=1)).R
        ours = (left[:, self.k :] * d.double()) @ right[:, self.k :].T
        return float(((left[:, : self.k] * exact) @ right[:, : self.k].T - ours).norm() / self.S.norm())


def orthogonal(n: int, columns: int, generator: torch.Generator) -> Tensor:
    """Orthonormal columns without a factorisation: two cosine transforms with random signs and a shuffle."""
    row, column = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)[None]
    cosine = torch.cos(math.pi * (column + 0.5) * row / n) * math.sqrt(2 / n)
    cosine[0] /= math.sqrt(2)
    signs = [torch.randint(2, (n,), generator=generator).double() * 2 - 1 for _ in range(2)]
    shuffled = (cosine * signs[0])[:, torch.randperm(n, generator=generator)[:columns]]
    return (cosine * signs[1]) @ shuffled


def bulk(m: int, n: int) -> Tensor:
    """Singular values of a Gaussian matrix of this shape, interpolated from a smaller one of the same ratio."""
    f = max(1, min(m, n) // 512)
    generator = torch.Generator().manual_seed(1)
    small = torch.linalg.svdvals(torch.randn(m // f, n // f, generator=generator, dtype=torch.float64)) * math.sqrt(f)
    return torch.nn.functional.interpolate(small[None, None], size=min(m, n), mode="linear")[0, 0]


def spectrum(kind: str, m: int, n: int) -> Tensor:
    """Singular values by the name of the spectrum."""
    j, noise = torch.arange(1, min(m, n) + 1, dtype=torch.float64), bulk(m, n)
    spikes = torch.tensor([40.0, 25.0, 9.0, 3.0], dtype=torch.float64)
    values = {
        "power 0.5": j**-0.5,
        "power 1": 1 / j,
        "trained": torch.where(j < min(m, n) / 8, noise[0] * (1 + 3 * j**-0.5), noise),
        "collapsed": torch.cat([noise[0] * spikes, noise[4:]]),
        "flat": noise,
    }[kind]
    return values.sort(descending=True).values


def case(kind: str, m: int, n: int) -> Case:
    """Build one matrix."""
    generator = torch.Generator().manual_seed(0)
    S, r = spectrum(kind, m, n), min(m, n)
    U, V = orthogonal(m, r, generator), orthogonal(n, r, generator)
    return Case(((U * S) @ V.T).float().contiguous(), U, S, V)


def ours(made: Case, tol: float) -> Triplets:
    """This package, told nothing but the tolerance."""
    found = pss.dominant_directions(made.W, tol=tol)
    return found.U, (found.S - found.edge).clamp_min(0), found.Vh.mT


def lowrank(made: Case, q: int, niter: int) -> Triplets:
    """``torch.svd_lowrank``."""
    U, S, V = torch.svd_lowrank(made.W, q=q, niter=niter)
    k = made.k
    return U[:, :k], (S[:k] - S[k]).clamp_min(0), V[:, :k]


def full(made: Case) -> Triplets:
    """``torch.linalg.svd``."""
    U, S, Vh = torch.linalg.svd(made.W, full_matrices=False)
    k = made.k
    return U[:, :k], S[:k] - S[k], Vh[:k].mT


def lobpcg(made: Case, niter: int) -> Triplets:
    """``torch.lobpcg`` on the Gram operator."""
    gram, k = made.W.mT @ made.W, made.k
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(gram.shape[0], k + 1, generator=generator)
    values, V = torch.lobpcg(gram, k=k + 1, X=start, niter=niter, tol=0.0)
    S = values.clamp_min(0).sqrt()
    return (made.W @ V[:, :k]) / S[:k], (S[:k] - S[k]).clamp_min(0), V[:, :k]


def scipy_svds(made: Case, solver: str, tol: float) -> Triplets:
    """``scipy.sparse.linalg.svds``."""
    from scipy.sparse.linalg import svds

    U, S, Vh = svds(made.W.numpy(), k=made.k + 1, solver=solver, tol=tol, rng=0)
    U, S, Vh = (torch.from_numpy(x.copy()) for x in (U[:, ::-1], S[::-1], Vh[::-1]))
    return U[:, : made.k], (S[: made.k] - S[made.k]).clamp_min(0), Vh[: made.k].mT


def sklearn_randomized(made: Case, extra: int, niter: int) -> Triplets:
    """``sklearn.utils.extmath.randomized_svd``."""
    from sklearn.utils.extmath import randomized_svd

    U, S, Vh = (
        torch.from_numpy(x)
        for x in randomized_svd(made.W.numpy(), made.k + 1, n_oversamples=extra, n_iter=niter, random_state=0)
    )
    return U[:, : made.k], (S[: made.k] - S[made.k]).clamp_min(0), Vh[: made.k].mT


def cheapest(
    made: Case, target: float, settings: list[Callable[[], Triplets]]
) -> tuple[Callable[[], Triplets], float] | None:
    """The fastest of the settings, cheapest first, that reach the target; looks at three that do."""
    reached: list[tuple[float, Callable[[], Triplets], float]] = []
    for setting in settings:
        torch.manual_seed(0)
        start = time.perf_counter()
        found = setting()
        seconds, error = time.perf_counter() - start, made.error(found)
        if error <= target:
            reached.append((seconds, setting, error))
        if len(reached) == 3:
            break
    return None if not reached else min(reached, key=lambda item: item[0])[1:]


def rivals(made: Case, every: bool) -> dict[str, list[Callable[[], Triplets]]]:
    """Rival methods with their settings, cheapest first."""
    k, most = made.k, min(made.W.shape)
    widths = sorted({min(most, k + extra) for extra in (6, max(12, k // 2), k + 10)})
    table: dict[str, list[Callable[[], Triplets]]] = {
        "svd_lowrank": [lambda q=q, i=i: lowrank(made, q, i) for i in range(10) for q in widths],
    }
    if every:
        table["sklearn"] = [lambda q=q, i=i: sklearn_randomized(made, q - k, i) for i in range(10) for q in widths]
        table["lobpcg"] = [lambda i=i: lobpcg(made, i) for i in (5, 10, 20, 40)] if 3 * (k + 1) < most else []
        for solver in ("arpack", "propack", "lobpcg"):
            table[f"svds {solver}"] = (
                [lambda s=solver, t=t: scipy_svds(made, s, t) for t in (1e-1, 1e-2, 1e-4)] if k < 100 else []
            )
        table["linalg.svd"] = [lambda: full(made)]
    return table


def measure(made: Case, target: float, repeats: int, every: bool) -> dict[str, object]:
    """One cell: our time, error and bound, and each rival's ratio to our time."""
    chosen = {name: cheapest(made, target, settings) for name, settings in rivals(made, every).items()}
    mine, theirs = [], {name: [] for name, pick in chosen.items() if pick}
    ours(made, target)
    for _ in range(repeats):
        start = time.perf_counter()
        found = ours(made, target)
        mine.append(time.perf_counter() - start)
        for name, times in theirs.items():
            start = time.perf_counter()
            chosen[name][0]()
            times.append(time.perf_counter() - start)
    certificate = float(pss.dominant_directions(made.W, tol=target).error)
    return {
        "ms": 1e3 * min(mine),
        "warm_ms": 1e3 * warm_start(made, target, repeats),
        "error": made.error(found),
        "bound": certificate,
        "k": made.k,
        "ratios": {name: min(times) / min(mine) for name, times in theirs.items()},
        "missed": [name for name, pick in chosen.items() if not pick],
    }


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
        start = time.perf_counter()
        torch.dot(W.view(-1), W.view(-1))
        read = time.perf_counter() - start
        start = time.perf_counter()
        found = pss.dominant_directions(W, tol=tol)
        spent = time.perf_counter() - start
        seconds, reading = seconds + spent, reading + read
        row = {"shape": f"{m}x{n}", "s": spent, "read_s": read, "k": int(found.k), "sr": float(found.stable_rank)}
        rows.append(row | {"bound": float(found.error), "passes_at_reading_speed": spent / read})
    return {"s": seconds, "read_s": reading, "tol": tol, "threads": threads, "matmul_flops": max(rates), "rows": rows}


@click.command()
@click.option("--shapes", default="512x512,1024x1024,2048x2048,768x3072", help="Comma-separated m x n.")
@click.option("--spectra", default=",".join(SPECTRA), help="Comma-separated names.")
@click.option("--targets", default="1e-2,1e-3,1e-4", help="Error of the smoothed matrix over its norm.")
@click.option("--repeats", default=5, help="Interleaved runs a cell; the least time counts.")
@click.option("--threads", default=2, help="torch threads.")
@click.option("--every", is_flag=True, help="Measure lobpcg, scipy, scikit-learn and the full SVD too.")
@click.option("--layer", "with_layer", is_flag=True, help="Add one layer of Llama-2-7B's shapes.")
@click.option("--json", "out", type=click.Path(path_type=Path), default=RESULTS, help="Where the numbers go.")
def main(
    shapes: str, spectra: str, targets: str, repeats: int, threads: int, every: bool, with_layer: bool, out: Path
) -> None:
    """Print the table and write it as JSON."""
    torch.set_num_threads(threads)
    versions = (
        f"torch {torch.__version__}, pss_param {pss.__version__}, {platform.processor()}, {threads} threads, seed 0"
    )
    table = Table(
        "shape", "spectrum", "k", "target", "ms", "warm", "error", "bound", "others' time / ours", title=versions
    )
    cells = []
    for shape in shapes.split(","):
        m, n = map(int, shape.split("x"))
        for kind in spectra.split(","):
            made = case(kind, m, n)
            for target in map(float, targets.split(",")):
                cell = measure(made, target, repeats, every) | {"shape": shape, "spectrum": kind, "target": target}
                cells.append(cell)
                ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in cell["ratios"].items()) or "none reached it"
                row = (
                    shape,
                    kind,
                    cell["k"],
                    target,
                    f"{cell['ms']:.2f}",
                    f"{cell['warm_ms']:.2f}",
                    f"{cell['error']:.1e}",
                    f"{cell['bound']:.1e}",
                )
                table.add_row(*map(str, row), ratios)
    Console().print(table)
    seen = [cell["ratios"]["svd_lowrank"] for cell in cells if "svd_lowrank" in cell["ratios"]]
    if seen:
        mean = math.exp(sum(map(math.log, seen)) / len(seen))
        click.echo(f"svd_lowrank / ours over {len(seen)} cells: geometric mean {mean:.2f}, worst {min(seen):.2f}")
    report: dict[str, object] = {"versions": versions, "cells": cells}
    if with_layer:
        report["layer"] = layer(1e-2, threads)
        click.echo(json.dumps(report["layer"]))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
