# SPDX-License-Identifier: Apache-2.0
"""Dominant directions of a ``DTensor``: those of the whole matrix, the same bits on every rank."""

from __future__ import annotations

import pytest
import torch
from ranks import Ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from pss_param.spectrum import dominant_directions

SHAPES = [(300, 260), (150, 420)]
OPTIONS = {"stable rank": {}, "rank": {"rank": 5}, "bulk": {"above": "bulk"}, "tight": {"tol": 1e-4}}


def matrix(shape: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    left, right = (torch.randn(size, 12, generator=generator) for size in shape)
    return torch.randn(shape, generator=generator) + 0.4 * (left * torch.arange(1, 13) ** -0.7) @ right.T


def directions(world: int) -> dict:
    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for shape in SHAPES:
        for dim in (0, 1):
            sharded = distribute_tensor(matrix(shape), mesh, [Shard(dim)])
            for name, options in OPTIONS.items():
                one = dominant_directions(sharded, **options)
                warm = dominant_directions(sharded, **options, init=one.Vh.mT) if name != "bulk" else one
                found[shape, dim, name] = (one.U, one.S, one.Vh, one.edge, one.k, one.error), warm.S
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_shards_give_the_directions_of_the_whole_matrix(two_ranks: Ranks, four_ranks: Ranks, world: int) -> None:
    by_rank = (two_ranks if world == 2 else four_ranks)(directions, world)
    for (shape, _, name), (first, warm) in by_rank[0].items():
        whole = dominant_directions(matrix(shape), **OPTIONS[name])
        U, S, Vh, edge, k, error = first
        norm, tol = float(matrix(shape).norm()), OPTIONS[name].get("tol", 1e-3)
        assert int(k) == int(whole.k)
        assert float(error) <= tol
        torch.testing.assert_close(S, whole.S, rtol=0, atol=tol * norm)
        torch.testing.assert_close(warm, whole.S, rtol=0, atol=tol * norm)
        ours, theirs = ((U * (S - edge)) @ Vh, (whole.U * (whole.S - whole.edge)) @ whole.Vh)
        if name != "bulk":  # the edge of a level is not the level
            assert float((ours - theirs).norm()) <= 2 * tol * norm
    for other in by_rank[1:]:
        for key, (factors, _) in other.items():
            assert all(torch.equal(a, b) for a, b in zip(factors, by_rank[0][key][0], strict=True)), key
