# SPDX-License-Identifier: Apache-2.0
"""Float32 matrices whose float64 decomposition is known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

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


@lru_cache(maxsize=1)
def sides(m: int, n: int) -> tuple[Tensor, Tensor]:
    """Singular vectors that all spectra of one shape share."""
    generator, r = torch.Generator().manual_seed(0), min(m, n)
    return orthogonal(m, r, generator), orthogonal(n, r, generator)


def case(kind: str, m: int, n: int) -> Case:
    """Build one matrix."""
    S, (U, V) = spectrum(kind, m, n), sides(m, n)
    return Case(((U * S) @ V.T).float().contiguous(), U, S, V)
