# SPDX-License-Identifier: Apache-2.0
r"""Smoothing one stored tensor: into matrices, correction, back, one cast, and what was measured.

# Note [What a deep repair does to a matrix]
It keeps the directions and gives them one value. What keeps more of the spectrum ended higher: the matrix clipped at
the spectral norm of a fresh one, or at its own bulk (``deep-clip-init`` and ``deep-clip-bulk`` in
``examples/benchmarks/results/stability.md``), and in single runs other values at the same norm.

# Note [Token tables]
A deadly rate collapses the table of tokens as well, and its fresh scale is unknown, so it keeps its norm. What goes
on ends lower for it or level (``deep-tables-left`` is without). Tables of places are smooth and of low rank in health;
made flat in single runs, they cost a BERT 0.2 nats.

A table that is the head as well (:mod:`pss_param.ties`) is treated as a head. Left as a deadly rate made it, it turned
the first logits after a repair of a small GPT-2 into a loss of 27 to 39 nats, and late deaths that went on from there
ended 0.5 to 0.8 nats behind fresh weights (``repair-tables-left`` in ``examples/benchmarks/results/gpt2-small-0.json``
and its neighbours). Tables that are added to it come down to the norm of fresh ones, all values by one factor, or they
would outweigh it.

# Note [Scale of a deep repair]
The two numbers below were chosen on few runs, and differ little from others: ``deep-scale-...`` and ``deep-ends-...``.
"""

import hashlib
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from pss_param.checkpoint.transfer import tensor_bytes
from pss_param.edges import fresh_std, init
from pss_param.errors import NonFiniteError
from pss_param.finite import count_nonfinite
from pss_param.lowrank import Correction
from pss_param.options import RepairOptions, pick_device
from pss_param.report import MatrixReport, TensorReport
from pss_param.room import DEEP
from pss_param.smoothing import Smoothing, correction, scaled
from pss_param.spectrum import spectral_norm, stable_rank
from pss_param.targets import Target

CLIPPED = {"kernel": 2.0, "roomy": DEEP}
"""Levels to which a deep repair only clips, over the spectral norm of a fresh matrix: :class:`pss_param.plan.Plan`."""
DEEP_SCALE = 1.2
"""Frobenius norm of a matrix after a deep repair, over that of a fresh one: Note [Scale of a deep repair]."""
ENDS = 2.0
"""As much more for heads and stems: Note [Scale of a deep repair]."""

_ROUNDED = 0.01  # relative, of the squared norms of rows in bfloat16


@dataclass(frozen=True)
class Part:
    r"""One batch of matrices of a tensor.

    Args:
        name: such as ``"q"``; empty where the tensor has one part.
        number: its place among the parts.
        values: ``(..., m, n)``.
        healthy: the same part of the reference, or None.
    """

    name: str
    number: int
    values: Tensor
    healthy: Tensor | None

    def label(self, index: tuple[int, ...]) -> str:
        r"""Name one matrix of the batch.

        Args:
            index: its place in the leading dimensions.

        Returns:
            Such as ``"q"``, ``"[3]"`` or ``"q[3]"``; empty for the only matrix of a tensor.

        Example:
            >>> Part("q", 0, torch.zeros(4, 2, 2), None).label((3,))
            'q[3]'
        """
        return self.name + (str(list(index)).replace(" ", "") if index else "")

    @property
    def indices(self) -> Iterator[tuple[int, ...]]:
        r"""The places of all matrices in the leading dimensions."""
        return product(*(range(size) for size in self.values.shape[:-2]))


def parts_of(target: Target, weight: Tensor, healthy: Tensor | None = None) -> list[Part]:
    r"""Take a tensor apart into the batches of matrices it acts as.

    Args:
        target: what it is.
        weight: the tensor.
        healthy: the same tensor of a reference, or None.

    Returns:
        Views of the tensor where possible.
    """
    values = target.matricization.split(weight)
    names = target.matricization.part_names(tuple(weight.shape)) if len(values) > 1 else ("",)
    good: Sequence[Tensor | None] = [None] * len(values)
    if healthy is not None:
        good = target.matricization.split(healthy)
    rows = zip(names, values, good, strict=True)
    return [Part(name, number, part, well) for number, (name, part, well) in enumerate(rows)]


class Surgeon:
    r"""Smooths tensors one at a time under the same options.

    Args:
        options: what to do.
        special: targets that a deep repair treats otherwise than the rest: :class:`pss_param.plan.Plan`.

    Raises:
        ArgumentError: the device is not there.
    """

    def __init__(self, options: RepairOptions, special: Mapping[str, str]) -> None:
        r"""See the class."""
        self.options, self.special = options, special if options.deep else {}
        self.device = pick_device(options.device)

    def smooth(
        self, target: Target, weight: Tensor, healthy: Tensor | None = None, masters: Sequence[Tensor] = ()
    ) -> tuple[Tensor, tuple[Tensor, ...], TensorReport]:
        r"""Smooth one tensor.

        Args:
            target: what it is and which matrices it is made of.
            weight: the stored tensor, finite.
            healthy: its counterpart in the reference, for ``edge="reference"``.
            masters: copies of it in higher precision. What is corrected is the first of them, and the rest become
                casts of it: a correction of the weight itself would keep its rounding, which a deep repair makes large.

        Returns:
            The smoothed tensor, of the same type, shape and device (the given one where nothing changed), the
            masters likewise, and what was measured.

        Raises:
            NonFiniteError: the result does not fit into the stored type.
        """
        here = weight.to(self.device)
        parts = parts_of(target, here, None if healthy is None else healthy.to(self.device))
        copies = [target.matricization.split(master.to(self.device)) for master in masters]
        matrices: list[MatrixReport] = []
        new = [self._smooth_part(target, part, [copy[part.number] for copy in copies], matrices) for part in parts]
        if all(fresh[0] is part.values for fresh, part in zip(new, parts, strict=True)):
            return weight, tuple(masters), _report(target, weight, weight, matrices)
        joined = []
        for batch, old in zip(zip(*new, strict=True), (weight, *masters), strict=True):
            joined.append(target.matricization.join(batch, like=old.to(self.device)).to(old.device).contiguous())
            if count := count_nonfinite([joined[-1]]):
                raise NonFiniteError(
                    f"{target.name} would have {count} infinite value(s) after the cast to {old.dtype}; "
                    "exclude it, or convert the checkpoint to bfloat16 or float32 first"
                )
        return joined[0], tuple(joined[1:]), _report(target, weight, joined[0], matrices)

    def _smooth_part(
        self, target: Target, part: Part, copies: Sequence[Tensor], into: list[MatrixReport]
    ) -> list[Tensor]:
        # Every matrix of a batch on its own: less memory than all at once.
        old = result = [part.values, *copies]
        finest = copies[0] if copies else part.values
        for index in part.indices:
            fix = self._correct(target, part, finest[index], index)
            if fix.is_noop:
                into.append(_describe(part.label(index), old[0][index], old[0][index], fix))
                continue
            fresh = fix.apply(finest[index])
            if len(part.values.shape) == 2:
                result = [fresh.to(values.dtype) for values in old]
            else:
                result = [values.clone() for values in old] if result is old else result
                for values in result:
                    values[index] = fresh
            into.append(_describe(part.label(index), old[0][index], result[0][index], fix))
        return result

    def _correct(self, target: Target, part: Part, matrix: Tensor, index: tuple[int, ...]) -> Correction:
        if self.special.get(target.name) == "added":
            return scaled(matrix, self._norm_beside_a_head(target, matrix))
        rule = self._rule(target, part.values.shape[-1])
        if rule.edge == "reference" and part.healthy is not None:
            rule = replace(rule, reference=float(spectral_norm(part.healthy[index])))
        # One start per matrix: the result does not depend on which other tensors were chosen.
        seed = (zlib.crc32(f"{target.name}/{part.number}/{index}".encode()) ^ self.options.seed) & 0x7FFFFFFF
        generator = torch.Generator().manual_seed(seed)
        return correction(matrix, rule, generator=generator)

    def _norm_beside_a_head(self, target: Target, table: Tensor) -> float:
        """That of a fresh table; without a limit where the head keeps its scale, and where nothing was learned."""
        if not self._flattens or _is_sinusoidal(table):
            return math.inf
        return (self.options.rule().init_std or target.init_std or fresh_std(table.shape[-1])) * math.sqrt(
            table.numel()
        )

    @property
    def _flattens(self) -> bool:
        rule = self.options.rule()
        return self.options.deep and (rule.shape, rule.edge) == ("equal", "init")

    def _rule(self, target: Target, columns: int) -> Smoothing:
        rule, what = self.options.rule(), self.special.get(target.name)
        std = rule.init_std or target.init_std
        if what == "table":
            return Smoothing("equal", tol=rule.tol)
        if what == "kernel" or (what == "roomy" and self._flattens):  # which may follow any other rule
            return Smoothing("clip", lambda W: CLIPPED[what] * init(W, std), tol=rule.tol)
        if self._flattens:
            scale = DEEP_SCALE * (ENDS if what == "end" else 1)
            return replace(rule, init_std=scale * (std or fresh_std(columns)))
        return replace(rule, init_std=std) if rule.edge in {"init", "mild"} else rule


def _is_sinusoidal(table: Tensor) -> bool:
    """Whether it holds sines and cosines of places: each pair of them adds one to the square of every row's norm."""
    squares = torch.linalg.vector_norm(table.double(), dim=1).square() * (2 / table.shape[1])
    return bool(((squares - 1).abs() < _ROUNDED).all())


def _describe(label: str, old: Tensor, new: Tensor, fix: Correction) -> MatrixReport:
    before = float(fix.stable_rank), float(fix.spectral_norm)
    after = before if fix.is_noop else (float(stable_rank(new)), float(spectral_norm(new)))
    return MatrixReport(
        part=label,
        shape=(old.shape[-2], old.shape[-1]),
        stable_rank=(before[0], after[0]),
        spectral_norm=(before[1], after[1]),
        k=int(fix.k),
        edge=float(fix.edge),
        residual=float(fix.residual.max()) if fix.residual.numel() else 0.0,
        converged=bool(fix.converged.all()),
        note=_why_unchanged(fix, before[1]) if fix.is_noop else "",
    )


def _why_unchanged(fix: Correction, norm: float) -> str:
    if norm == 0:
        return "the matrix is zero"
    if float(fix.edge) <= 0:
        return "the matrix has too low a rank for an edge"
    return "no singular value lies above the edge"


def _report(target: Target, old: Tensor, new: Tensor, matrices: Sequence[MatrixReport]) -> TensorReport:
    changed = new is not old and not torch.equal(new, old)
    return TensorReport(
        name=target.name,
        role=target.role,
        block=target.block,
        dtype=str(old.dtype).removeprefix("torch."),
        shape=tuple(old.shape),
        changed=changed,
        relative_change=0.0 if new is old else relative_change(old, new),
        matrices=tuple(matrices),
        digest=digest(new) if changed else "",
    )


def digest(value: Tensor) -> str:
    r"""Fingerprint of a tensor's bytes in row-major order.

    Args:
        value: any tensor with values.

    Returns:
        SHA-256 in hexadecimal.

    Example:
        >>> digest(torch.zeros(2))[:8] == hashlib.sha256(bytes(8)).hexdigest()[:8]
        True
    """
    plain = value.detach().cpu().contiguous()
    return hashlib.sha256(tensor_bytes(plain)).hexdigest()


def relative_change(old: Tensor, new: Tensor) -> float:
    r"""Relative Frobenius distance, piece by piece so that no whole copy is made.

    .. math:: \|new - old\|_F / \|old\|_F

    Args:
        old: any shape and floating type.
        new: of the same shape.

    Returns:
        Dimensionless; 1 where only ``old`` is zero.

    Example:
        >>> relative_change(torch.ones(4), torch.full((4,), 1.5))
        0.5
    """
    moved = total = 0.0
    for before, after in zip(_pieces(old), _pieces(new), strict=True):
        wide = before.double()
        total += float(wide.square().sum())
        moved += float((after.double() - wide).square().sum())
    if total:
        return math.sqrt(moved / total)
    return 1.0 if moved else 0.0


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    return torch.split(tensor.reshape(-1), 1 << 20)
