# SPDX-License-Identifier: Apache-2.0
"""Matrices with known spectra, and the slow float64 twin of the smoothing, shared by several tests."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def with_spectrum(m: int, n: int, S: Tensor, seed: int = 0) -> Tensor:
    """A float64 matrix with random singular vectors and the given singular values."""
    g = torch.Generator().manual_seed(seed)
    r = min(m, n)
    U = torch.linalg.qr(torch.randn(m, r, generator=g, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, r, generator=g, dtype=torch.float64)).Q
    return (U * S[:r].double()) @ V.T


def gaussian(m: int, n: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=g, dtype=torch.float64)


def power(r: int, exponent: float) -> Tensor:
    return torch.arange(1, r + 1, dtype=torch.float64) ** -exponent


@lru_cache(maxsize=1)
def trained() -> dict[str, Tensor]:
    """Weights of a small network that learned something, at a sane and at a large learning rate."""
    weights = {}
    for name, rate in (("trained", 0.1), ("trained hard", 1.0)):
        g = torch.Generator().manual_seed(11)
        X = torch.randn(64, 40, generator=g, dtype=torch.float64)
        Y = torch.sin(X @ torch.randn(40, 5, generator=g, dtype=torch.float64))
        layers = [
            torch.randn(m, n, generator=g, dtype=torch.float64) / n**0.5 for m, n in ((170, 40), (150, 170), (5, 150))
        ]
        for layer in layers:
            layer.requires_grad_()
        for _ in range(40):
            out = X
            for layer in layers[:-1]:
                out = torch.tanh(out @ layer.T)
            grads = torch.autograd.grad((out @ layers[-1].T - Y).square().mean(), layers)
            with torch.no_grad():
                for layer, grad in zip(layers, grads, strict=True):
                    layer -= rate * grad
        weights[name] = layers[1].detach()
    return weights


def corpus() -> dict[str, Tensor]:
    """float64 matrices by the name of what makes them hard."""
    j = torch.arange(260, dtype=torch.float64)
    spike = torch.zeros(160, 160, dtype=torch.float64)
    spike[3, 5] = 40.0
    return {
        "flat": gaussian(160, 200),
        "flat tall": gaussian(400, 90),
        "power law 0.5": with_spectrum(220, 300, power(220, 0.5)),
        "power law 1": with_spectrum(300, 200, power(200, 1.0)),
        "power law 2": with_spectrum(300, 200, power(200, 2.0)),
        "one spike": gaussian(160, 160) + spike * 3,
        "clustered top": with_spectrum(250, 250, torch.where(j < 12, 1.0 - 1e-4 * j, 0.2 / (1 + j))),
        "repeated": with_spectrum(250, 260, torch.where(j < 30, 1.0, 0.1)),
        "identity": torch.eye(150, dtype=torch.float64),
        "rank deficient": with_spectrum(200, 200, torch.where(j < 20, 1.0 / (1 + j), 0.0)),
        "rank one": with_spectrum(150, 180, torch.where(j < 1, 3.0, 0.0)),
        "zero": torch.zeros(120, 140, dtype=torch.float64),
        "1 x n": gaussian(1, 300),
        "m x 1": gaussian(300, 1),
        "1 x 1": gaussian(1, 1),
        "2 x 2": gaussian(2, 2),
        "huge": 1e30 * with_spectrum(200, 240, power(200, 1.0)),
        "tiny": 1e-30 * with_spectrum(200, 240, power(200, 1.0)),
        **trained(),
        "graded": with_spectrum(200, 200, 10.0 ** (-j / 8)),
    }


def exact_clip(W: Tensor, k: int | None = None, level: float | None = None) -> Tensor:
    """Slow twin: ``clip`` by a full float64 decomposition."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    if level is None:
        level = float(S[k]) if k is not None and k < S.numel() else 0.0
    return (U * S.clamp_max(level)) @ Vh


def exact_bulk_level(W: Tensor) -> float:
    """Slow twin: the Marchenko-Pastur edge by repeating its definition."""
    S, (m, n) = torch.linalg.svdvals(W.double()), W.shape
    factor, level = (m**0.5 + n**0.5) / (m * n) ** 0.5, float("inf")
    for _ in range(100_000):
        new = float(factor * S.clamp_max(level).square().sum().sqrt())
        if abs(level - new) <= 1e-13 * new:
            break
        level = new
    return level
