# SPDX-License-Identifier: Apache-2.0
r"""Any weight, as the matrices it acts as, and back, exactly.

A spectrum belongs to a linear map. What a layer stores is often not that map but a packing of several: three
projections stacked into one `qkv`, the same interleaved head by head, a kernel with its spatial axes, a stack
of experts. A `Matricization` says in two einops expressions how to unpack one weight:

- `source` names the axes as stored: in `"(h r d) i"` (GPT-NeoX) rows run over heads `h`, q, k, v, then `d`;
- `part` arranges the same axes as a batch of matrices, e.g. `"(h r d) i"` or, head by head, `"(h r) d i"`;
- `along` names the axis on which parts lie side by side (`r`), and `parts` says who owns how much of it.

The last axis of every matrix is the input, the last but one the output, as in `torch.nn.Linear`.

Note [Views where strides allow]
--------------------------------
`split` returns views of the weight wherever strides can express the part; writing into a part then writes
into the weight. They can for every layout here but three, which are copies: parts interleaved head by head
that are not asked for per head (the rows of q lie apart), transposed convolutions, and kernels with strides
of their own such as channels-last. `join_` is right in every case.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import EinopsError, rearrange
from torch import Tensor

from pss_param.errors import ArgumentError

_SPATIAL = ("x", "y", "z")


@dataclass(frozen=True)
class Matricization:
    r"""How one weight is unpacked into matrices: immutable, hashable, picklable, `asdict` gives JSON.

    Args:
        source: einops expression of the weight as it is stored.
        part: einops expression of one part, whose last two axes are `(output, input)` of a matrix.
        along: the axis of `source` along which parts lie side by side; empty for a single part.
        parts: `(name, length)` of each part along that axis, in the order stored.
        sizes: `(axis, length)` of axes that the shape of the weight does not tell.
        only: names of the parts to work on; empty means all. Parts left out are never touched.

    Example:
        >>> import torch
        >>> qkv = stacked({"q": 4, "k": 2, "v": 2})
        >>> [tuple(part.shape) for part in qkv.split(torch.zeros(8, 4))]
        [(4, 4), (2, 4), (2, 4)]
        >>> print(qkv)
        r i, r = q 4 + k 2 + v 2
    """

    source: str = "o i"
    part: str = "o i"
    along: str = ""
    parts: tuple[tuple[str, int], ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse parts that do not exist.

        Raises:
            ArgumentError: `only` names a part that the weight has not.
        """
        names = [name for name, _ in self.parts]
        if not set(self.only) <= set(names):
            raise ArgumentError(f"only must name parts of the weight, got {list(self.only)}; the parts are {names}")

    def __str__(self) -> str:
        """Describe the unpacking in a few words, for reports.

        Returns:
            The two expressions, the lengths of the parts and which of them are used.
        """
        text = self.source if self.source == self.part else f"{self.source} -> {self.part}"
        if self.parts:
            text += f", {self.along} = " + " + ".join(f"{name} {length}" for name, length in self.parts)
        text += "".join(f", {axis} = {length}" for axis, length in self.sizes)
        return text + (f", only {' '.join(self.only)}" if self.only else "")

    @property
    def linear(self) -> bool:
        """Whether the weight is the one matrix itself, so that `split(W)` is `(W,)`."""
        return self.source == self.part == "o i" and not self.parts

    def part_names(self, shape: Sequence[int] = ()) -> tuple[str, ...]:
        """Name the parts that `split` returns, in its order.

        Args:
            shape: shape of the weight; when given, it must fit.

        Returns:
            Names such as `("q", "k", "v")`; `("",)` for a weight of one part.

        Example:
            >>> interleaved(heads=4, only=("q", "k")).part_names()
            ('q', 'k')
        """
        if shape:
            self._unpack(torch.empty(tuple(shape), device="meta"))
        return tuple(name for name, _ in self.parts if not self.only or name in self.only) or ("",)

    def split(self, weight: Tensor) -> tuple[Tensor, ...]:
        r"""Unpack a weight into its matrices. See Note [Views where strides allow].

        Args:
            weight: the weight, or anything of its shape (a gradient, a correction).

        Shape:
            - weight: as `source` says
            - each part: `(..., m, n)`

        Returns:
            One tensor per part: views of `weight` where strides allow, else copies.

        Example:
            >>> import torch
            >>> kernel = torch.zeros(8, 3, 5, 5)
            >>> [tuple(part.shape) for part in convolution(4).split(kernel)]
            [(8, 75)]
        """
        if self.linear:
            self._check_matrix(weight)
            return (weight,)
        return tuple(rearrange(piece, f"{self._axes} -> {self.part}") for piece in self._pieces(weight))

    def join(self, parts: Sequence[Tensor], like: Tensor) -> Tensor:
        r"""Pack matrices into a weight, the exact inverse: `join(split(W), W)` has the bits of `W`.

        Args:
            parts: one tensor per part, as `split` returns them.
            like: gives the shape, and the values of the parts that `only` leaves out. To pack something that
                is no weight, such as a correction, pass zeros.

        Shape:
            - parts: each `(..., m, n)`
            - Output: shape of `like`

        Returns:
            The packed tensor, in the dtype of the parts. It may share memory with the parts, and for a plain
            matrix it is `parts[0]` itself; it never changes `like`.
        """
        self._check_parts(parts)
        if self.linear:
            return parts[0]
        if self.only:
            return self.join_(parts, like.detach().to(parts[0].dtype, copy=True))
        lengths = self._lengths(like)
        unpacked = [self._unfold(part, lengths, name) for part, name in zip(parts, self.part_names(), strict=True)]
        whole = torch.cat(unpacked, dim=self._dim) if self.parts else unpacked[0]
        return rearrange(whole, f"{self._axes} -> {self.source}")

    def join_(self, parts: Sequence[Tensor], weight: Tensor) -> Tensor:
        """Write matrices into a weight in place; parts that `only` leaves out stay as they are.

        Args:
            parts: one tensor per part, as `split` returns them (views of `weight` too).
            weight: the weight to write into. One that requires grad needs `torch.no_grad()` around the call.

        Returns:
            The weight.

        Example:
            >>> import torch
            >>> weight = torch.zeros(6, 1)
            >>> how = stacked({"q": 2, "k": 2, "v": 2}, only=("k",))
            >>> how.join_([torch.ones(2, 1)], weight).flatten().tolist()
            [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]
        """
        self._check_parts(parts)
        lengths = self._lengths(weight)
        for piece, part, name in zip(self._pieces(weight), parts, self.part_names(), strict=True):
            piece.copy_(self._unfold(part, lengths, name))
        return weight

    # The elementary axes in the order stored, e.g. "h r d i".
    @property
    def _axes(self) -> str:
        return " ".join(re.findall(r"\w+", self.source))

    # Where `along` stands among the elementary axes.
    @property
    def _dim(self) -> int:
        return self._axes.split().index(self.along)

    # Gives every elementary axis a dimension of its own: only splits axes, hence always a view.
    def _unpack(self, weight: Tensor) -> Tensor:
        sizes = dict(self.sizes)
        if self.parts:
            sizes[self.along] = sum(length for _, length in self.parts)
        known = {axis: sizes[axis] for axis in self._axes.split() if axis in sizes}
        try:
            return rearrange(weight, f"{self.source} -> {self._axes}", **known)
        except EinopsError as error:
            raise ArgumentError(f"a weight stored as {self} cannot have the shape {tuple(weight.shape)}") from error

    # Cuts the unpacked weight along the axis of parts, and keeps those in use.
    def _pieces(self, weight: Tensor) -> list[Tensor]:
        unpacked = self._unpack(weight)
        if not self.parts:
            return [unpacked]
        pieces = torch.split(unpacked, [length for _, length in self.parts], dim=self._dim)
        return [
            piece for piece, (name, _) in zip(pieces, self.parts, strict=True) if not self.only or name in self.only
        ]

    # Length of every elementary axis of the whole weight.
    def _lengths(self, weight: Tensor) -> dict[str, int]:
        return dict(zip(self._axes.split(), self._unpack(weight).shape, strict=True))

    # The inverse of arranging one part: its elementary axes in the order stored.
    def _unfold(self, part: Tensor, lengths: Mapping[str, int], name: str) -> Tensor:
        own = {**lengths, self.along: dict(self.parts)[name]} if self.parts else dict(lengths)
        try:
            return rearrange(part, f"{self.part} -> {self._axes}", **own)
        except EinopsError as error:
            raise ArgumentError(
                f"part {name!r} of a weight stored as {self} cannot have the shape {tuple(part.shape)}"
            ) from error

    def _check_parts(self, parts: Sequence[Tensor]) -> None:
        names = self.part_names()
        if len(parts) != len(names):
            raise ArgumentError(f"{self} has {len(names)} parts, got {len(parts)}; pass what split returned")

    def _check_matrix(self, weight: Tensor) -> None:
        if weight.ndim != 2:
            raise ArgumentError(
                f"a plain matrix has two axes, got shape {tuple(weight.shape)}; matricize it as its layer"
            )


LINEAR = Matricization()
"""`torch.nn.Linear`: `(out, in)` is the matrix."""

TRANSPOSED = Matricization("i o", "o i")
"""Hugging Face's `Conv1D` of GPT-2: `(in, out)`."""


def stacked(
    rows: Mapping[str, int],
    *,
    transposed: bool = False,
    head_dim: int | None = None,
    only: tuple[str, ...] = (),
) -> Matricization:
    r"""Projections stacked block after block along the output: fused q/k/v, fused gate/up.

    Args:
        rows: name and number of output rows of each part, in order; they may differ (grouped queries).
        transposed: the weight is stored `(in, out)`, as GPT-2's `c_attn`.
        head_dim: give it to get a batch of matrices, one per head of that many rows.
        only: the parts to work on; empty means all.

    Returns:
        A matricization whose parts are views.

    Raises:
        ArgumentError: a part is not a whole number of heads.

    Example:
        >>> import torch
        >>> c_attn = stacked({"q": 6, "k": 6, "v": 6}, transposed=True, head_dim=2)
        >>> [tuple(part.shape) for part in c_attn.split(torch.zeros(6, 18))]
        [(3, 2, 6), (3, 2, 6), (3, 2, 6)]
    """
    if head_dim is None:
        return Matricization("i r" if transposed else "r i", "r i", "r", tuple(rows.items()), (), only)
    if any(length % head_dim for length in rows.values()):
        raise ArgumentError(
            f"per head, every part must be a whole number of heads of {head_dim} rows, got {dict(rows)}"
        )
    heads = tuple((name, length // head_dim) for name, length in rows.items())
    return Matricization("i (r d)" if transposed else "(r d) i", "r d i", "r", heads, (("d", head_dim),), only)


def interleaved(
    heads: int, group: Mapping[str, int] | None = None, *, per_head: bool = False, only: tuple[str, ...] = ()
) -> Matricization:
    r"""Fused q/k/v whose rows run head by head: q, k, v of the first, then of the second (GPT-NeoX, BLOOM).

    Args:
        heads: number of heads, or of key/value groups.
        group: heads of each part within a group; default one each of q, k, v. Falcon's groups have more q.
        per_head: make a batch of matrices, one per head; a part of one head per group is then a view.
        only: the parts to work on; empty means all.

    Returns:
        A matricization with parts q, k, v.

    Example:
        >>> import torch
        >>> weight = torch.arange(12.0).reshape(12, 1)
        >>> q, k, v = interleaved(heads=2).split(weight)
        >>> q.flatten().tolist(), k.flatten().tolist()
        ([0.0, 1.0, 6.0, 7.0], [2.0, 3.0, 8.0, 9.0])
    """
    parts = tuple((group or {"q": 1, "k": 1, "v": 1}).items())
    return Matricization("(h r d) i", "(h r) d i" if per_head else "(h r d) i", "r", parts, (("h", heads),), only)


def by_heads(head_dim: int, *, of_input: bool = False, transposed: bool = False) -> Matricization:
    """One projection of attention as a batch of matrices, one per head.

    Args:
        head_dim: length of a head.
        of_input: the input comes from heads (the output projection) rather than the output going to heads (q,
            k, v).
        transposed: the weight is stored `(in, out)`.

    Returns:
        A matricization of one part, `(heads, head_dim, in)` or `(heads, out, head_dim)`; always views.
    """
    sizes = (("d", head_dim),)
    if of_input:
        return Matricization("(h d) o" if transposed else "o (h d)", "h o d", sizes=sizes)
    return Matricization("i (h d)" if transposed else "(h d) i", "h d i", sizes=sizes)


def convolution(ndim: int, groups: int = 1, *, transposed: bool = False) -> Matricization:
    r"""A convolution kernel as `(out, in * taps)`, or `(out * taps, in)` for a transposed one, per group.

    .. math:: y_{o,p} = \sum_{i,t} W_{o,(i,t)} x_{i,p+t}

    Args:
        ndim: dimensions of the stored kernel: 3 for 1-d, 4 for 2-d, 5 for 3-d convolutions.
        groups: groups of the convolution; they become the batch.
        transposed: `ConvTranspose`, stored `(in, out / groups, ...)`.

    Returns:
        A matricization of one part.

    Raises:
        ArgumentError: a kernel must have 3 to 5 dimensions.

    Example:
        >>> import torch
        >>> [part.shape for part in convolution(3, groups=2).split(torch.zeros(4, 3, 5))]
        [torch.Size([2, 2, 15])]
    """
    if ndim not in {3, 4, 5}:
        raise ArgumentError(f"a convolution kernel has 3, 4 or 5 dimensions, got {ndim}")
    taps = " ".join(_SPATIAL[: ndim - 2])
    first, part = ("i", f"(o {taps}) i") if transposed else ("o", f"o (i {taps})")
    second = "o" if transposed else "i"
    if groups == 1:
        return Matricization(f"{first} {second} {taps}", part)
    return Matricization(f"(g {first}) {second} {taps}", f"g {part}", sizes=(("g", groups),))


def experts(
    rows: Mapping[str, int] | None = None,
    *,
    transposed: bool = False,
    alternating: bool = False,
    only: tuple[str, ...] = (),
) -> Matricization:
    r"""A stack of experts, one matrix each: `(experts, out, in)`.

    Args:
        rows: parts fused along the output, such as `{"gate": f, "up": f}`; None for one part.
        transposed: stored `(experts, in, out)`.
        alternating: parts of equal length alternate output by output (GPT-OSS).
        only: the parts to work on; empty means all.

    Returns:
        A matricization whose parts have the experts as batch.

    Example:
        >>> import torch
        >>> how = experts({"gate": 2, "up": 2}, transposed=True, alternating=True)
        >>> gate, up = how.split(torch.arange(4.0).reshape(1, 1, 4))
        >>> gate.flatten().tolist(), up.flatten().tolist()
        ([0.0, 2.0], [1.0, 3.0])
    """
    if rows is None:
        return Matricization("e i o" if transposed else "e o i", "e o i")
    if alternating:
        ones = tuple((name, 1) for name in rows)
        return Matricization("e i (o r)" if transposed else "e (o r) i", "e (o r) i", "r", ones, (), only)
    return Matricization("e i r" if transposed else "e r i", "e r i", "r", tuple(rows.items()), (), only)
