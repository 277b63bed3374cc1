# SPDX-License-Identifier: Apache-2.0
"""A Cholesky factor by panels says what the library's says."""

from __future__ import annotations

import pytest
import torch

from pss_param.definite import SMALL, positive_definite

SIZES = [1, 128, SMALL, SMALL + 1, 512, 700]


def symmetric(n: int, least: float, dtype=torch.float64) -> torch.Tensor:
    """A random matrix with eigenvalues from ``least`` to 1."""
    generator = torch.Generator().manual_seed(n)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    return ((Q * torch.linspace(least, 1, n, dtype=torch.float64)) @ Q.T).to(dtype)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_sign_of_the_least_eigenvalue_decides(n, dtype):
    margin = 100 * torch.finfo(dtype).eps
    assert positive_definite(symmetric(n, margin, dtype))
    if n > 1:
        assert not positive_definite(symmetric(n, -margin, dtype))


@pytest.mark.parametrize("place", [0, 127, 128, 450, 699])
def test_a_negative_direction_is_found_in_whatever_panel_it_lies(place):
    A = symmetric(700, 0.1)
    A[place, place] -= 2
    assert not positive_definite(A)


def test_only_the_upper_triangle_counts():
    A = symmetric(512, 0.01)
    assert positive_definite(A.triu() + torch.full_like(A, torch.nan).tril(-1))


@pytest.mark.parametrize("n", [SMALL + 1, 700])
def test_what_is_left_behind_is_no_other_than_the_library_s_factor_would_give(n, monkeypatch):
    """The last panel is what elimination has made of the last rows: its factor is the last block of the whole one."""
    last, library = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda A, **how: last.append(library(A, **how)) or last[-1])
    A = symmetric(n, 0.01)
    whole = library(A, upper=True).L
    assert positive_definite(A.clone())
    U = last[-1].L
    torch.testing.assert_close(U, whole[-len(U) :, -len(U) :])


def test_nan_is_not_positive():
    A = symmetric(500, 0.1)
    A[400, 450] = torch.nan
    assert not positive_definite(A)
