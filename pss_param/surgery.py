# SPDX-License-Identifier: Apache-2.0
r"""Smoothing one stored tensor: into matrices, correction, back, one cast, and what was measured."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from types import TracebackType

import torch
from torch import Tensor

from pss_param.checkpoint import open_checkpoint
from pss_param.errors import ArgumentError, NonFiniteError
from pss_param.finite import count_nonfinite
from pss_param.options import RepairOptions, pick_device
from pss_param.plan import StateDictSource, TensorSource
from pss_param.report import MatrixReport, TensorReport
from pss_param.smoothing import Correction, correction
from pss_param.spectrum import spectral_norm, stable_rank
from pss_param.targets import Target


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
    r"""Smooths tensors one at a time under the same options; a context manager that holds the reference open.

    Args:
        options: what to do.

    Raises:
        ArgumentError: the device is not there.
        CheckpointError: the reference cannot be read.
    """

    def __init__(self, options: RepairOptions) -> None:
        r"""See the class."""
        self.options = options
        self.device = pick_device(options.device)
        self._reference: TensorSource | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "Surgeon":
        r"""Open the reference.

        Returns:
            The surgeon itself.
        """
        reference = self.options.reference
        if isinstance(reference, Mapping):
            self._reference = StateDictSource(reference)
        elif reference is not None:
            self._reference = self._stack.enter_context(open_checkpoint(reference))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        r"""Close the reference."""
        self._stack.close()

    def smooth(self, target: Target, weight: Tensor) -> tuple[Tensor, TensorReport]:
        r"""Smooth one tensor.

        Args:
            target: what it is and which matrices it is made of.
            weight: the stored tensor, finite.

        Returns:
            The smoothed tensor, of the same type, shape and device (the given one where nothing changed), and
            what was measured.

        Raises:
            NonFiniteError: the result does not fit into the stored type.
        """
        here = weight.to(self.device)
        parts = self._parts(target, here)
        matrices: list[MatrixReport] = []
        new = [self._smooth_part(target, part, matrices) for part in parts]
        joined = weight
        if any(fresh is not part.values for fresh, part in zip(new, parts, strict=True)):
            joined = target.matricization.join(tuple(new), like=here).to(weight.device).contiguous()
        if count := count_nonfinite([joined]):
            raise NonFiniteError(
                f"{target.name} would have {count} infinite value(s) after the cast to {weight.dtype}; "
                "exclude it, or convert the checkpoint to bfloat16 or float32 first"
            )
        return joined, _report(target, weight, joined, matrices)

    def _parts(self, target: Target, weight: Tensor) -> list[Part]:
        if self._reference is None:
            return parts_of(target, weight)
        good = self._read_reference(self._reference, target.name, tuple(weight.shape))
        return parts_of(target, weight, good.to(self.device))

    def _smooth_part(self, target: Target, part: Part, into: list[MatrixReport]) -> Tensor:
        # Every matrix of a batch on its own: less memory than all at once.
        result = part.values
        for index in part.indices:
            old = part.values[index]
            fix = self._correct(target, part, index)
            fresh = old if fix.is_noop else fix.apply(old)
            into.append(_describe(part.label(index), old, fresh, fix))
            if fresh is not old:
                result = part.values.clone() if result is part.values else result
                result[index] = fresh
        return result

    def _correct(self, target: Target, part: Part, index: tuple[int, ...]) -> Correction:
        rule = self.options.rule()
        if rule.edge == "init" and rule.init_std is None:
            rule = replace(rule, init_std=target.init_std)
        if part.healthy is not None:
            rule = replace(rule, reference=float(spectral_norm(part.healthy[index])))
        # One start per matrix: the result does not depend on which other tensors were chosen.
        seed = (zlib.crc32(f"{target.name}/{part.number}/{index}".encode()) ^ self.options.seed) & 0x7FFFFFFF
        generator = torch.Generator().manual_seed(seed)
        return correction(part.values[index], rule, generator=generator)

    @staticmethod
    def _read_reference(reference: TensorSource, name: str, shape: tuple[int, ...]) -> Tensor:
        stored = reference.tensors.get(name)
        if stored is None or stored.shape != shape or not stored.floating:
            found = "does not have it" if stored is None else f"has it as {stored.dtype_name} {stored.shape}"
            raise ArgumentError(
                f"{name} {shape} needs its counterpart, but the reference {found}; "
                "name a checkpoint of the same model, or exclude the tensor"
            )
        if count := count_nonfinite(reference.blocks(name)):
            raise NonFiniteError(f"the reference has {count} non-finite value(s) in {name}; name a healthy one")
        return reference.read(name)


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
    return TensorReport(
        name=target.name,
        role=target.role,
        block=target.block,
        dtype=str(old.dtype).removeprefix("torch."),
        shape=tuple(old.shape),
        changed=new is not old and not torch.equal(new, old),
        relative_change=0.0 if new is old else _relative_change(old, new),
        matrices=tuple(matrices),
    )


def _relative_change(old: Tensor, new: Tensor) -> float:
    # Piece by piece, so that no third copy of the tensor is made.
    moved = total = 0.0
    for before, after in zip(torch.split(old.flatten(), 1 << 20), torch.split(new.flatten(), 1 << 20), strict=True):
        wide = before.double()
        total += float(wide.square().sum())
        moved += float((after.double() - wide).square().sum())
    return (moved / total) ** 0.5 if total else 0.0
