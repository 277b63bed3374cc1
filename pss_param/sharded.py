# SPDX-License-Identifier: Apache-2.0
r"""A weight whose pieces lie on several devices, as a linear map: thin products without gathering the matrix.

# Note [One answer on all ranks]
What a rank computes from these products decides how many more of them there will be, so they have to be the same
bits everywhere, or ranks would wait for each other for ever. Small groups therefore exchange their partial products
and add them in the order of ranks: the same sum everywhere, whatever the collective's algorithm. Large groups
reduce, and where a mesh has several dimensions the ranks then take the result of its first rank. Both move blocks
as thin as the product, never the matrix.

# Note [Which rows and columns are here]
A rank holds the rows and columns that it would hold of the numbers of rows and columns, sharded likewise. That
asks no formula for uneven shards or for the strided order that tensor parallelism and FSDP2 produce together.

# Note [The same bits cut and whole]
A matrix product of fewer rows may run in another kernel, which adds in another order. Where FSDP2 cuts a weight at
rest, a forward pass would then show other last bits than the shards that a fold or a checkpoint stores. So what is
whole in forward is made piece by piece too.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from pss_param.errors import ArgumentError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["Cut", "Layout", "ShardedMatrix", "cut_product", "is_sharded", "local_product", "whole_norm"]

# Partial products of at most so many ranks are exchanged and added in order; of more, reduced.
_ORDERED_RANKS = 16


def is_sharded(weight: object) -> "TypeGuard[DTensor]":
    r"""Tell whether a tensor is a ``DTensor``, without importing that machinery for those who do not use it.

    Args:
        weight: Any object.

    Returns:
        Whether it is a :class:`torch.distributed.tensor.DTensor`.

    Example:
        >>> is_sharded(torch.zeros(2))
        False
    """
    return isinstance(weight, Tensor) and hasattr(weight, "device_mesh") and hasattr(weight, "placements")


class ShardedMatrix:
    r"""The linear map of a sharded matrix; all ranks of its mesh must make the same calls in the same order.

    Rows and columns may be sharded over any dimensions of the mesh, unevenly too. Inputs and outputs are plain
    tensors that every rank holds whole, so only thin blocks should pass.

    Args:
        weight: The matrix ``(m, n)``.
        batched: Whether ``shape`` is ``(1, m, n)``, as engines that work on batches want it.

    Attributes:
        shape: ``(m, n)`` or ``(1, m, n)``.
        dtype: float32, or float64 for a float64 matrix.
        device: Where inputs and outputs live.

    Raises:
        ArgumentError: If the weight is no sharded matrix, or holds sums that are still to be made.
    """

    def __init__(self, weight: "DTensor", *, batched: bool = False) -> None:
        if not is_sharded(weight):
            raise ArgumentError(f"a sharded matrix must be a DTensor, got {type(weight).__name__}")
        if weight.dim() != 2 or any(place.is_partial() for place in weight.placements):
            seen = f"{tuple(weight.placements)} of {tuple(weight.shape)}"
            raise ArgumentError(f"a sharded matrix must be (m, n) without partial sums, got {seen}")
        self.mesh, self.placements = weight.device_mesh, tuple(weight.placements)
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self._local = weight.to_local().detach().to(wide)
        self._rows, self._columns = _indices(weight, 0), _indices(weight, 1)
        self._matrix_shape = torch.Size(weight.shape)
        self._batch = torch.Size((1,)) if batched else torch.Size()
        self.dtype, self.device = wide, self._local.device

    @property
    def shape(self) -> torch.Size:
        """``(m, n)``, or ``(1, m, n)`` for a batched one."""
        return torch.Size((*self._batch, *self._matrix_shape))

    @property
    def mT(self) -> "ShardedMatrix":
        """The transpose; shares the local piece."""
        other = object.__new__(ShardedMatrix)
        other.__dict__.update(self.__dict__)
        other._local, other._rows, other._columns = self._local.mT, self._columns, self._rows
        other._matrix_shape = torch.Size(reversed(self._matrix_shape))
        return other

    def times(self, X: Tensor) -> Tensor:
        r"""``W X``: one exchange of a block ``(m, b)``.

        Args:
            X: The same on every rank, ``(..., n, b)``.

        Returns:
            ``(..., m, b)``, the same bits on every rank.
        """
        part = self._local @ X[..., self._columns, :]
        whole = part.new_zeros(*part.shape[:-2], self._matrix_shape[0], part.shape[-1])
        return self._sum(whole.index_copy_(-2, self._rows, part))

    def times_t(self, Y: Tensor) -> Tensor:
        r"""``W^T Y``: one exchange of a block ``(n, b)``.

        Args:
            Y: The same on every rank, ``(..., m, b)``.

        Returns:
            ``(..., n, b)``, the same bits on every rank.
        """
        return self.mT.times(Y)

    def __matmul__(self, X: Tensor) -> Tensor:
        """``W @ X``.

        Args:
            X: The same on every rank, ``(..., n, b)``.

        Returns:
            ``(..., m, b)``.
        """
        return self.times(X)

    def __rmatmul__(self, Y: Tensor) -> Tensor:
        """``Y @ W``.

        Args:
            Y: The same on every rank, ``(..., b, m)``.

        Returns:
            ``(..., b, n)``.
        """
        return self.times_t(Y.mT).mT

    def frobenius_norm(self) -> Tensor:
        r"""``||W||_F``, added in float64.

        Returns:
            float64, ``()`` or ``(1,)``; not finite where an entry is not. Neither overflows nor underflows.
        """
        if self._local.numel():
            rows = torch.linalg.vector_norm(self._local.double(), dim=-1)
            square = torch.linalg.vector_norm(rows).square()
        else:
            square = torch.zeros((), dtype=torch.float64, device=self.device)
        return self._sum(square.reshape(1, 1)).sqrt().reshape(self._batch)

    def gathered(self) -> Tensor:
        r"""The whole matrix on every rank, for matrices so small that thin products do not pay.

        Returns:
            A plain tensor of ``shape``.
        """
        whole = torch.zeros(self._matrix_shape, dtype=self.dtype, device=self.device)
        whole[self._rows[:, None], self._columns] = self._local
        return self._sum(whole).reshape(self.shape)

    def new_zeros(self, *shape: int) -> Tensor:
        r"""Zeros in the dtype and on the device of inputs and outputs.

        Args:
            *shape: The shape.

        Returns:
            A plain tensor.
        """
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def agreed(self, value: Tensor) -> Tensor:
        r"""The first rank's value on all ranks of the mesh.

        Args:
            value: A tensor of one shape on all ranks.

        Returns:
            That of the mesh's first rank.
        """
        return _agreed(value, self.mesh)

    def _sum(self, part: Tensor) -> Tensor:
        # Ranks along a dimension that shards nothing hold the same, and add nothing.
        dims = [i for i, place in enumerate(self.placements) if not place.is_replicate()]
        total = part
        for dim in dims:
            total = _sum_over(total, self.mesh.get_group(dim))
        if self.mesh.ndim > 1 and self.mesh.size() > _ORDERED_RANKS:
            return _agreed(total, self.mesh)
        return total


class Cut(NamedTuple):
    """How FSDP2 cuts at rest what a forward pass has in one piece; see Note [The same bits cut and whole].

    Attributes:
        dim: The dimension that is cut.
        pieces: Their number, as :func:`torch.chunk` makes them.
    """

    dim: int = 0
    pieces: int = 1


_WHOLE = Cut()


class Layout(NamedTuple):
    """Where a sharded weight lies.

    Attributes:
        mesh: Its ``DeviceMesh``.
        placements: Its placements, one per dimension of the mesh.
    """

    mesh: Any
    placements: tuple[Any, ...]

    def cut_of(self, weight: Tensor) -> Cut:
        r"""How the pieces of this layout cut what another, coarser one has.

        Args:
            weight: The weight in the coarser layout, plain or sharded over some dimensions of the mesh.

        Returns:
            The cut of that weight, or of its local part.
        """
        kept = set(weight.device_mesh.mesh_dim_names or ()) if is_sharded(weight) else set()
        names = self.mesh.mesh_dim_names or (None,) * self.mesh.ndim
        for i, (name, place) in enumerate(zip(names, self.placements, strict=True)):
            if name not in kept and getattr(place, "dim", None) is not None:
                return Cut(place.dim, self.mesh.size(i))
        return Cut()


def cut_product(left: Tensor, right: Tensor, cut: Cut) -> Tensor:
    r"""``left @ right``, each piece of a cut by itself.

    Args:
        left: ``(m, r)``.
        right: ``(r, n)``.
        cut: The pieces.

    Returns:
        ``(m, n)``; every piece has the bits that it has where it is made alone.
    """
    left, right = left.contiguous(), right.contiguous()
    if cut.pieces == 1:
        return left @ right
    whole, start = left.new_empty(left.shape[0], right.shape[1]), 0
    for piece in (left if cut.dim == 0 else right).chunk(cut.pieces, cut.dim):
        product = piece @ right if cut.dim == 0 else left @ piece.contiguous()
        whole.narrow(cut.dim, start, piece.shape[cut.dim]).copy_(product)
        start += piece.shape[cut.dim]
    return whole


def local_product(weight: "DTensor", left: Tensor, right: Tensor, cut: Cut = _WHOLE) -> "DTensor":
    r"""``left @ right`` where the weight has its rows and columns; nothing is communicated.

    Args:
        weight: The sharded matrix ``(m, n)``.
        left: ``(m, r)``, the same on every rank.
        right: ``(r, n)``, the same on every rank.
        cut: The pieces in which the local part is made.

    Returns:
        A ``DTensor`` with the mesh, placements and shape of ``weight`` and the dtype of the factors.
    """
    device = weight.to_local().device
    rows, columns = _indices(weight, 0), _indices(weight, 1)
    return _wrapped(cut_product(left.to(device)[rows], right.to(device)[:, columns], cut), weight)


def local_part(weight: "DTensor", whole: Tensor) -> "DTensor":
    r"""The pieces of a whole tensor that lie where the weight has its own; nothing is communicated.

    Args:
        weight: The sharded weight, of any shape.
        whole: A plain tensor of that shape, the same on every rank.

    Returns:
        A ``DTensor`` with the mesh and placements of ``weight``.
    """
    piece = whole
    for dim in range(whole.dim()):
        piece = piece.index_select(dim, _indices(weight, dim))
    return _wrapped(piece, weight)


def whole_norm(norm: Tensor) -> Tensor:
    r"""A norm as one plain number, the same bits on all ranks of its mesh; every one of them must call.

    Args:
        norm: A norm of sharded gradients, or a plain one.

    Returns:
        A plain scalar.

    Example:
        >>> float(whole_norm(torch.tensor(2.0)))
        2.0
    """
    if not is_sharded(norm):
        return norm
    whole = norm.full_tensor()
    # Reductions of different groups may round differently, and a decision must not depend on the rank.
    return _agreed(whole, norm.device_mesh) if norm.device_mesh.ndim > 1 else whole


def _indices(weight: "DTensor", dim: int) -> Tensor:
    """The global indices along ``dim`` of what this rank holds; see Note [Which rows and columns are here]."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    if any(place.is_partial() for place in weight.placements):
        raise ArgumentError(f"a sharded weight must not hold partial sums, got {tuple(weight.placements)}")
    places = [_along(place) if _shards(place, dim, weight.dim()) else Replicate() for place in weight.placements]
    numbers = torch.arange(weight.shape[dim], device=weight.to_local().device)
    # Without a source rank every rank cuts its own numbers, and nothing is sent.
    return distribute_tensor(numbers, weight.device_mesh, places, src_data_rank=None).to_local()


def _shards(place: Any, dim: int, ndim: int) -> bool:
    sharded = getattr(place, "dim", None)
    return sharded is not None and sharded % ndim == dim


def _along(place: Any) -> Any:
    split_factor = getattr(place, "split_factor", None)
    kind = type(place)
    return kind(0) if split_factor is None else kind(0, split_factor=split_factor)


def _wrapped(piece: Tensor, weight: "DTensor") -> "DTensor":
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        piece, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )


def _sum_over(part: Tensor, group: "dist.ProcessGroup") -> Tensor:
    part = part.contiguous()
    size = dist.get_world_size(group)
    if size > _ORDERED_RANKS:
        dist.all_reduce(part, group=group)
        return part
    parts = [torch.empty_like(part) for _ in range(size)]
    dist.all_gather(parts, part, group=group)
    return _sum_in_order(parts)


def _sum_in_order(parts: Iterable[Tensor]) -> Tensor:
    first, *others = parts
    for other in others:
        first = first.add_(other)
    return first


def _agreed(value: Tensor, mesh: Any) -> Tensor:
    value = value.contiguous().clone()
    for dim in range(mesh.ndim):
        group = mesh.get_group(dim)
        dist.broadcast(value, src=dist.get_global_rank(group, 0), group=group)
    return value
