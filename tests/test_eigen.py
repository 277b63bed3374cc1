# SPDX-License-Identifier: Apache-2.0
"""The block Jacobi method and the bound by powers against ``torch.linalg``."""

from __future__ import annotations

import pytest
import torch

from pss_param import eigen

KINDS = {
    "random": lambda j, f: torch.rand(f, dtype=torch.float64, generator=torch.Generator().manual_seed(f)),
    "falling": lambda j, f: j**-1.4,
    "steep": lambda j, f: j**-6,
    "low rank": lambda j, f: (j < 5).double(),
    "clustered": lambda j, f: torch.where(j < 20, 1 - 1e-9 * j, 1e-8 * j),
    "zero": lambda j, f: 0 * j,
}


def matrices(kind: str, f: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(3, f, f, generator=generator, dtype=torch.float64)).Q
    A = (Q * KINDS[kind](torch.arange(1, f + 1, dtype=torch.float64), f)) @ Q.mT
    return (A + A.mT) / 2


@pytest.mark.parametrize("f", [5, 33, 64, 100, 160])
@pytest.mark.parametrize("kind", KINDS)
def test_block_jacobi_agrees_with_torch(kind: str, f: int) -> None:
    A = matrices(kind, f)
    found = eigen.block_jacobi(A)
    assert found is not None
    values, V = found
    size = float(torch.linalg.matrix_norm(A).max())
    torch.testing.assert_close(values, torch.linalg.eigvalsh(A), rtol=0, atol=1e-12 * size)
    torch.testing.assert_close(A @ V, V * values[:, None], rtol=0, atol=3e-12 * size)
    torch.testing.assert_close(V.mT @ V, torch.eye(f).double().expand(3, f, f), rtol=0, atol=1e-12)


def test_rounds_that_do_not_come_to_rest_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eigen, "_SWEEPS", 1)
    assert eigen.block_jacobi(matrices("random", 100)) is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_by_powers_is_above_the_largest_value_and_close(kind: str) -> None:
    A = matrices(kind, 96)
    bound, largest = eigen.bound_by_powers(A), torch.linalg.eigvalsh(A)[:, -1]
    assert (bound >= largest * (1 - 1e-12)).all()
    assert (bound <= largest * 1.01 + 1e-300).all()


@pytest.mark.parametrize("many", [False, True])
def test_both_ways_give_the_same(many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eigen, "_in_rounds", lambda A: many)
    A = matrices("falling", 48)
    values, V = eigen.eigh(A)
    torch.testing.assert_close(values, torch.linalg.eigh(A).eigenvalues, rtol=0, atol=1e-12)
    torch.testing.assert_close(eigen.eigvalsh(A), values, rtol=0, atol=1e-12)
    torch.testing.assert_close((V * values[:, None]) @ V.mT, A, rtol=0, atol=1e-11)
