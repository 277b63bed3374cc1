# SPDX-License-Identifier: Apache-2.0
"""Many small eigenproblems and the bound by powers against ``torch.linalg``."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

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


def matrices(kind: str, f: int, count: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(count, f, f, generator=generator, dtype=torch.float64)).Q
    A = (Q * KINDS[kind](torch.arange(1, f + 1, dtype=torch.float64), f)) @ Q.mT
    return (A + A.mT) / 2


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eigen, "on_gpu", lambda A: True)
    monkeypatch.setattr(eigen, "_FEW", 1)


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("f", [5, 33, 64, 100, 160])
@pytest.mark.parametrize("kind", KINDS)
def test_threads_of_the_host_give_what_torch_gives(kind: str, f: int) -> None:
    A = matrices(kind, f)[:, None]
    values, V = eigen.eigh(A)
    size = float(torch.linalg.matrix_norm(A).max())
    assert values.shape == (6, 1, f)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(A), rtol=0, atol=1e-14 * size)
    torch.testing.assert_close(eigen.eigvalsh(A), values, rtol=0, atol=1e-13 * size)
    torch.testing.assert_close(A @ V, V * values[..., None, :], rtol=0, atol=1e-13 * size)


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_what_the_host_solves_depends_on_nothing_else_in_the_batch() -> None:
    A = matrices("random", 90)
    some = eigen.eigh(A[1:5])
    assert all(torch.equal(one[0], all_[1]) for one, all_ in zip(some, eigen.eigh(A), strict=True))


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize(("shape", "few", "there"), [
    ((6, 100, 100), 1, True), ((3, 100, 100), 1, False), ((4, 30, 30), 1, False), ((9, 200, 200), 1, True),
    ((9, 200, 200), 1000, False), ((9, 100, 100), 1000, True), ((99, 300, 300), 1, False),
])  # fmt: skip
def test_where_problems_are_solved(
    shape: tuple[int, ...], few: int, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eigen, "_FEW", few)
    assert eigen._on_host(torch.empty(shape)) is there


def test_the_threads_of_others_are_as_many_as_before() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        eigen._started.cache_clear()
        pool = eigen._threads()
        assert set(pool.map(lambda _: torch.get_num_threads(), range(12))) == {1}
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as new:
            assert new.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)
        eigen._started.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_by_powers_is_above_the_largest_value_and_close(kind: str) -> None:
    A = matrices(kind, 96)
    bound, largest = eigen.bound_by_powers(A), torch.linalg.eigvalsh(A)[:, -1]
    assert (bound >= largest * (1 - 1e-12)).all()
    assert (bound <= largest * 1.01 + 1e-300).all()
