# SPDX-License-Identifier: Apache-2.0
"""Products with a sharded matrix against the same products with the whole one."""

from __future__ import annotations

import pytest
import torch
from ranks import Ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

from pss_param.errors import ArgumentError
from pss_param.sharded import ShardedMatrix, local_part, local_product, whole_norm

ONE = {"rows": [Shard(0)], "columns": [Shard(1)], "replicated": [Replicate()], "negative": [Shard(-1)]}
TWO = {
    "rows, columns": [Shard(0), Shard(1)],
    "columns, rows": [Shard(1), Shard(0)],
    "rows twice": [Shard(0), Shard(0)],
    "replicas of rows": [Replicate(), Shard(0)],
    "columns of replicas": [Shard(1), Replicate()],
}


def products(mesh_shape: tuple[int, ...], layouts: dict, shape: tuple[int, int]) -> dict:
    mesh = init_device_mesh("cpu", mesh_shape)
    W = torch.randn(shape, dtype=torch.float64)
    X, Y = torch.randn(1, shape[1], 3, dtype=torch.float64), torch.randn(shape[0], 4, dtype=torch.float64)
    outcomes = {}
    for name, placements in layouts.items():
        sharded = distribute_tensor(W, mesh, placements)
        op = ShardedMatrix(sharded)
        delta = local_product(sharded, Y, torch.ones(4, shape[1], dtype=torch.float64))
        found = [op @ X, op.times(X), op.times_t(Y), op.mT @ Y, Y.mT @ op, op.frobenius_norm(), op.gathered()]
        found += [delta.full_tensor(), local_part(sharded, 2 * W).full_tensor(), op.mT.gathered()]
        truth = [W @ X, W @ X, W.mT @ Y, W.mT @ Y, Y.mT @ W, W.norm(), W]
        truth += [Y @ torch.ones(4, shape[1], dtype=torch.float64), 2 * W, W.mT]
        assert (delta.placements, delta.shape) == (sharded.placements, sharded.shape)
        outcomes[name] = (found, truth)
    return outcomes


@pytest.mark.parametrize("shape", [(12, 8), (7, 9), (1, 5)])
@pytest.mark.parametrize(("world", "mesh", "layouts"), [(2, (2,), ONE), (4, (4,), ONE), (4, (2, 2), TWO)])
def test_products_are_those_of_the_whole_matrix(
    two_ranks: Ranks, four_ranks: Ranks, shape: tuple, world: int, mesh: tuple, layouts: dict
) -> None:
    by_rank = (two_ranks if world == 2 else four_ranks)(products, mesh, layouts, shape)
    for name in layouts:
        for found, truth in (outcome[name] for outcome in by_rank):
            for ours, theirs, first in zip(found, truth, by_rank[0][name][0], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
                assert torch.equal(ours, first), f"{name}: ranks differ"


def two_dimensional_strided() -> list:
    """The layout of tensor parallelism under FSDP2: cut along the second mesh dimension first."""
    from torch import nn
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False))
    whole = [layer.weight.detach().clone() for layer in model]
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    outcomes = []
    for W, layer in zip(whole, model, strict=True):
        op, X = ShardedMatrix(layer.weight, batched=True), torch.randn(1, W.shape[1], 2)
        outcomes.append([op.shape, op.times(X), W @ X, op.gathered()[0], W, type(layer.weight.placements[0]).__name__])
    return outcomes


def test_the_strided_order_of_two_dimensional_parallelism(four_ranks: Ranks) -> None:
    by_rank = four_ranks(two_dimensional_strided)
    assert "_StridedShard" in [outcome[-1] for outcome in by_rank[0]], "this stack no longer makes the hard layout"
    for outcomes in by_rank:
        for (shape, product, truth, gathered, W, _), first in zip(outcomes, by_rank[0], strict=True):
            assert shape == (1, *W.shape)
            torch.testing.assert_close(product, truth)
            assert torch.equal(gathered, W)
            assert torch.equal(product, first[1])


def large_group() -> Tensor:  # noqa: F821
    import pss_param.sharded as module

    mesh = init_device_mesh("cpu", (2, 2))
    W, X = torch.randn(9, 6), torch.randn(6, 2)
    before, module._ORDERED_RANKS = module._ORDERED_RANKS, 1
    try:
        product = ShardedMatrix(distribute_tensor(W, mesh, [Shard(0), Shard(1)])) @ X
    finally:
        module._ORDERED_RANKS = before
    return product, W @ X


def test_large_groups_reduce(four_ranks: Ranks) -> None:
    by_rank = four_ranks(large_group)
    for product, truth in by_rank:
        torch.testing.assert_close(product, truth)
        assert torch.equal(product, by_rank[0][0])


def refusals() -> list[str]:
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (2,))
    messages = []
    for wrong in (
        torch.zeros(2, 2),
        distribute_tensor(torch.zeros(2, 2, 2), mesh, [Shard(0)]),
        DTensor.from_local(torch.zeros(2, 2), mesh, [Partial()]),
    ):
        try:
            ShardedMatrix(wrong)
        except ArgumentError as error:
            messages.append(str(error))
    return messages


def test_what_is_no_sharded_matrix_is_refused(two_ranks: Ranks) -> None:
    assert [len(messages) for messages in two_ranks(refusals)] == [3, 3]


def norms() -> tuple[float, float]:
    mesh = init_device_mesh("cpu", (2, 2))
    W = torch.randn(8, 8)
    norm = torch.linalg.vector_norm(distribute_tensor(W, mesh, [Shard(0), Shard(1)]))
    return float(whole_norm(norm)), float(W.norm())


def test_a_sharded_norm_is_the_global_one_on_every_rank(four_ranks: Ranks) -> None:
    by_rank = four_ranks(norms)
    assert len({seen for seen, _ in by_rank}) == 1
    assert by_rank[0][0] == pytest.approx(by_rank[0][1], rel=1e-6)
