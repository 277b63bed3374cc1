# SPDX-License-Identifier: Apache-2.0
"""The small matrices of an iteration, against the tall ones that they stand for."""

from __future__ import annotations

import pytest
import torch
from spectra import power, with_spectrum

from pss_param.arithmetic import DEVICE, HOST, Arithmetic
from pss_param.core import Core

Blocks = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def blocks(batch: int, dependent: bool = False) -> Blocks:
    """``W, X, V, P`` and ``R`` of an iteration with two blocks, straight from their definitions."""
    W = torch.stack([with_spectrum(60, 40, power(40, 0.5 + i), seed=i) for i in range(batch)])
    W = W / torch.linalg.matrix_norm(W)[:, None, None]
    X = torch.linalg.qr(torch.randn(batch, 60, 5, dtype=torch.float64)).Q
    first = torch.linalg.qr(W.mT @ X).Q
    R = W.mT @ (W @ first)
    V = torch.cat([first, torch.linalg.qr(R - first @ (first.mT @ R)).Q], dim=-1)
    P = W @ V
    if dependent:
        P[..., -1] = P[..., 0]
    R = W.mT @ P[..., -5:]
    return W, X, V, P, R - V @ (V.mT @ R)


def core(arithmetic: Arithmetic, X: torch.Tensor | None, P: torch.Tensor) -> Core:
    made = Core((60, 40), arithmetic, 2e-16)
    held = P[..., :0]
    if X is not None:
        made.anchor(X.mT @ X)
        held = X
    for block in P.split(5, dim=-1):
        held = torch.cat([held, block], dim=-1)
        made.append(held.mT @ block)
    return made


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("arithmetic", [HOST, DEVICE], ids=["host", "device"])
def test_behind_a_pass_back_a_look_is_one_at_the_best_left_subspace(arithmetic, anchored):
    W, X, V, P, R = blocks(3)
    left = torch.cat([X, P], dim=-1) if anchored else P
    made = core(arithmetic, X if anchored else None, P)
    ritz = made.ritz(R.mT @ R)
    true = torch.linalg.svdvals(torch.linalg.qr(left).Q.mT @ W)
    torch.testing.assert_close(torch.tensor(ritz.S, dtype=W.dtype), true, rtol=1e-9, atol=1e-9)
    parts = made.coordinates(ritz, 4)
    U, S = (parts.in_P @ left.mT).mT, torch.tensor(ritz.S, dtype=W.dtype)[:, None, :4]
    v = (parts.in_V @ V.mT + parts.in_R @ R.mT).mT
    torch.testing.assert_close(W.mT @ U, v * S, rtol=0, atol=1e-10)
    torch.testing.assert_close(U.mT @ U, torch.eye(4, dtype=W.dtype).expand(3, 4, 4), rtol=0, atol=1e-9)
    missed = torch.linalg.vector_norm(W @ v - U * S, dim=-2)
    assert (missed <= torch.tensor(ritz.residual, dtype=W.dtype)[:, :4] * (1 + 1e-9)).all()


@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize("returned", [False, True])
def test_host_and_device_say_the_same(returned, dependent):
    _, _, _, P, R = blocks(3, dependent)
    squares = R.mT @ R if returned else None
    host, device = core(HOST, None, P), core(DEVICE, None, P)
    mine, other = host.ritz(squares), device.ritz(squares)
    assert (mine.L is None) == (other.L is None) == (dependent or not returned)
    for one, two in ((mine.S, other.S), (mine.residual, other.residual), (mine.rest, other.rest)):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(two), rtol=1e-6, atol=1e-7)
    references = {i: 1.5 * mine.rest[i] ** 0.5 for i in (0, 2)}
    assert host.ceilings(mine, references).keys() == device.ceilings(other, references).keys() == {0, 2}
    for i, ceilings in host.ceilings(mine, references).items():
        assert ceilings == pytest.approx(device.ceilings(other, references)[i], rel=1e-6, abs=1e-6)


def test_what_was_measured_replaces_the_bound_where_the_left_side_says_nothing():
    _, _, _, P, _ = blocks(1)
    last = P[..., -1] + 1e-6 * torch.randn_like(P[..., -1])  # nearly the same as another column
    P = torch.cat([P, torch.stack([last, *P[..., -4:].unbind(-1)], dim=-1)], dim=-1)
    R = torch.randn(1, 40, 5, dtype=P.dtype)
    ritz = core(HOST, None, P).ritz(R.mT @ R)
    assert ritz.L is None
    torch.testing.assert_close(torch.from_numpy(ritz.coupling), R.mT @ R)


@pytest.mark.parametrize("returned", [False, True])
def test_directions_of_values_of_nothing_stay_finite(returned):
    _, _, _, P, R = blocks(1)
    P[..., 3:] = 0.0  # a matrix of rank three
    made = core(HOST, None, P)
    parts = made.coordinates(made.ritz(R.mT @ R if returned else None), 10)
    assert float(parts.in_P.abs().max()) < 1e10
    assert bool(torch.isfinite(parts.in_P @ P.mT).all())
