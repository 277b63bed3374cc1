# SPDX-License-Identifier: Apache-2.0
r"""What a repair did, as data: the content of the ``*.pss.json`` file beside every repaired checkpoint.

The file is one JSON object in UTF-8; all numbers are finite. ``[]`` stands for every element of a list, ``{}`` for
every value of an object whose keys are names of tensors. A pair is a list of two.

- ``schema`` (text): name and version of this description, see below.
- ``version`` (text): version of the program that wrote the file.
- ``source`` (text or null): path of the input; null for a state dict in memory.
- ``output`` (text or null): path of the result; null where nothing was written.
- ``format`` (text): the checkpoint's format in words; ``state_dict`` for a state dict in memory.
- ``options`` (object): what was asked for, one entry per field of :class:`~pss_param.RepairOptions`; a function is
  written as its name, a state dict given as the reference as ``state dict``.
- ``tensors`` (list of objects): the targets, in the checkpoint's order.
- ``tensors[].name`` (text): its key.
- ``tensors[].role`` (text): what it does in the model, such as ``q`` or ``down``.
- ``tensors[].block`` (integer or null): index of its layer.
- ``tensors[].dtype`` (text): stored type, as torch calls it.
- ``tensors[].shape`` (list of integers): stored shape.
- ``tensors[].changed`` (true or false): whether its bytes differ from the input's.
- ``tensors[].relative_change`` (number): Frobenius norm of the change over that of the input, after the cast to the
  stored type; dimensionless.
- ``tensors[].matrices`` (list of objects): the matrices it acts as; one for a linear layer, many for stacked experts.
- ``tensors[].matrices[].part`` (text): which matrix, such as ``q`` or ``[3]``; empty where the tensor is one matrix.
- ``tensors[].matrices[].shape`` (pair of integers): rows and columns.
- ``tensors[].matrices[].stable_rank`` (pair of numbers): before and after, measured on what is stored; dimensionless.
- ``tensors[].matrices[].spectral_norm`` (pair of numbers): before and after; in the units of the weight.
- ``tensors[].matrices[].k`` (integer): how many singular values were brought down.
- ``tensors[].matrices[].edge`` (number): the level they were brought to; in the units of the weight.
- ``tensors[].matrices[].residual`` (number): largest residual of the dominant directions, over the spectral norm;
  dimensionless.
- ``tensors[].matrices[].converged`` (true or false): whether every residual reached the asked tolerance.
- ``tensors[].matrices[].note`` (text): why nothing was changed, or empty.
- ``tensors[].digest`` (text): SHA-256 in hexadecimal of the new values in row-major order; empty where nothing changed.
- ``skipped`` (object of texts): the other tensors, in the checkpoint's order, with the reason.
- ``seconds`` (number): wall time of the repair, in seconds.
- ``restored`` (object of objects): tensors that were taken from the reference because they held NaN or infinity.
- ``restored{}.nonfinite`` (integer): how many of its values were not finite.
- ``restored{}.digest`` (text): as ``tensors[].digest``.
- ``reason`` (text): the strength that ``strength="auto"`` chose, and why; empty where it was given.
- ``vectors`` (object of texts): norms and biases that a deep repair put back to their initial values; each with its
  digest, as ``tensors[].digest``.
- ``notes`` (list of texts): what the user should know besides, one sentence each.
- ``drift`` (list of objects): how far each target had moved from the reference before the repair; empty without one.
- ``drift[].name`` (text): its key.
- ``drift[].role`` (text): as ``tensors[].role``.
- ``drift[].block`` (integer or null): index of its layer.
- ``drift[].distance`` (number): Frobenius norm of the difference over that of the reference; dimensionless.
- ``drift[].matrices`` (list of objects): the matrices it acts as.
- ``drift[].matrices[].part`` (text): as ``tensors[].matrices[].part``.
- ``drift[].matrices[].shape`` (pair of integers): rows and columns.
- ``drift[].matrices[].stable_rank`` (pair of numbers): in the reference and here; dimensionless.
- ``drift[].matrices[].spectral_norm`` (pair of numbers): in the reference and here; in the units of the weight.
- ``optimizer`` (object): what was done to the optimizer's state.
- ``optimizer.mode`` (text): what was asked for: ``keep``, ``reset`` or ``reset-all``.
- ``optimizer.states`` (integer): how many optimizer states the checkpoint has.
- ``optimizer.reset`` (list of texts): parameters whose state is initial now, by name, or by number where names were not
  needed.
- ``optimizer.masters`` (list of texts): keys of the float32 copies of weights that were repaired with them.
- ``optimizer.written`` (object of texts): as ``tensors[].digest``, by key, of every tensor of it that was written.
- ``optimizer.order`` (text): where the order of numbered parameters was taken from; empty where none was needed.

The number at the end of ``schema`` rises when a field is renamed or removed, or changes its type or its meaning. New
fields may come without that, so a reader passes over fields that it does not know, as :meth:`Report.from_json` does,
and refuses a schema with another number.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from pss_param.checkpoint.write import REPORT_SUFFIX
from pss_param.version import __version__

SCHEMA = "pss-param/repair-report/1"


@dataclass(frozen=True)
class MatrixReport:
    r"""One matrix of a repaired tensor; a plain linear weight has one, a stack of experts many.

    Args:
        part: which matrix of the tensor, such as ``"q"`` or ``"[3]"``; empty where the tensor is one matrix.
        shape: ``(m, n)``.
        stable_rank: before and after, dimensionless, measured on what is stored.
        spectral_norm: before and after, in the units of the weight.
        k: how many singular values were brought down.
        edge: the level they were brought to, in the units of the weight.
        residual: the largest residual of the dominant directions, relative to the spectral norm.
        converged: whether every residual reached the asked tolerance.
        note: why nothing was changed, or empty.
    """

    part: str
    shape: tuple[int, int]
    stable_rank: tuple[float, float]
    spectral_norm: tuple[float, float]
    k: int
    edge: float
    residual: float
    converged: bool
    note: str = ""


_M = TypeVar("_M", MatrixReport, "MatrixDrift")


@dataclass(frozen=True)
class TensorReport:
    r"""One tensor that was a target.

    Args:
        name: its key.
        role: what it does in the model, such as ``"q"`` or ``"down"``.
        block: index of its layer, or None.
        dtype: stored type.
        shape: stored shape.
        changed: whether its bytes differ from the input's.
        relative_change: :math:`\|W^* - W\|_F / \|W\|_F` after the cast to the stored type, dimensionless.
        matrices: one entry per matrix.
        digest: SHA-256 of the new bytes in row-major order; empty where nothing changed.
    """

    name: str
    role: str
    block: int | None
    dtype: str
    shape: tuple[int, ...]
    changed: bool
    relative_change: float
    matrices: tuple[MatrixReport, ...]
    digest: str = ""

    @property
    def worst(self) -> MatrixReport:
        r"""The matrix whose stable rank was the lowest."""
        return min(self.matrices, key=lambda matrix: matrix.stable_rank[0])


@dataclass(frozen=True)
class MatrixDrift:
    r"""One matrix in two checkpoints.

    Args:
        part: which matrix of the tensor; empty where there is only one.
        shape: ``(m, n)``.
        stable_rank: in the reference and here, dimensionless.
        spectral_norm: in the reference and here, in the units of the weight.
    """

    part: str
    shape: tuple[int, int]
    stable_rank: tuple[float, float]
    spectral_norm: tuple[float, float]

    @property
    def ratio(self) -> float:
        r"""Stable rank here over that of the reference; 1 where the reference is zero."""
        return self.stable_rank[1] / self.stable_rank[0] if self.stable_rank[0] else 1.0


@dataclass(frozen=True)
class TensorDrift:
    r"""One tensor in two checkpoints.

    Args:
        name: its key here.
        role: what it does in the model.
        block: index of its layer, or None.
        distance: :math:`\|W - R\|_F / \|R\|_F` from the reference :math:`R`, dimensionless.
        matrices: one entry per matrix.
    """

    name: str
    role: str
    block: int | None
    distance: float
    matrices: tuple[MatrixDrift, ...]

    @property
    def worst(self) -> MatrixDrift:
        r"""The matrix whose stable rank fell most."""
        return min(self.matrices, key=lambda matrix: matrix.ratio)


@dataclass(frozen=True)
class Restored:
    r"""One tensor that was taken from the reference because it held NaN or infinity.

    Args:
        nonfinite: how many of its values were not finite.
        digest: SHA-256 of the new bytes in row-major order.
    """

    nonfinite: int
    digest: str


@dataclass(frozen=True)
class OptimizerReport:
    r"""What was done to the optimizer states of a checkpoint.

    Args:
        mode: ``"keep"``, ``"reset"`` or ``"reset-all"``: what was asked for, or what ``"auto"`` chose.
        states: how many optimizer states the checkpoint has.
        reset: parameters whose state is initial now, by name, or by number where names were not needed.
        masters: keys of float32 copies of weights that were repaired with them.
        written: SHA-256 of the new bytes by key, of every tensor that was written.
        order: where the order of numbered parameters was taken from, or empty.
    """

    mode: str = "keep"
    states: int = 0
    reset: tuple[str, ...] = ()
    masters: tuple[str, ...] = ()
    written: Mapping[str, str] = field(default_factory=dict)
    order: str = ""


@dataclass(frozen=True)
class Report:
    r"""Everything a repair did.

    Args:
        source: path of the input, or None for a state dict in memory.
        output: path of the result, or None where nothing was written.
        format: the checkpoint's format, or ``"state_dict"``.
        options: what was asked for.
        tensors: the targets, in the checkpoint's order.
        skipped: the other tensors with the reason, in the checkpoint's order.
        seconds: wall time.
        restored: tensors taken from the reference, by name.
        drift: how far each target had moved from the reference before the repair; empty without one.
        optimizer: what was done to the optimizer's state.
        vectors: digests by name of the norms and biases that a deep repair put back to their initial values.
        reason: the strength that ``"auto"`` chose, and why; empty where it was given.
        notes: what the user should know besides, one sentence each.

    Example:
        >>> report = Report(None, None, "state_dict", {"edge": "bulk"}, (), {"ids": "integers"}, 0.0)
        >>> Report.from_json(report.to_json()) == report
        True
    """

    source: str | None
    output: str | None
    format: str
    options: Mapping[str, Any]
    tensors: tuple[TensorReport, ...]
    skipped: Mapping[str, str]
    seconds: float
    restored: Mapping[str, Restored] = field(default_factory=dict)
    drift: tuple[TensorDrift, ...] = ()
    optimizer: OptimizerReport = field(default_factory=OptimizerReport)
    vectors: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""
    notes: tuple[str, ...] = ()
    version: str = __version__
    schema: str = field(default=SCHEMA)

    @property
    def changed(self) -> tuple[str, ...]:
        r"""Names of the targets whose bytes differ from the input's."""
        return tuple(tensor.name for tensor in self.tensors if tensor.changed)

    def to_dict(self) -> dict[str, Any]:
        r"""The report in plain Python types.

        Returns:
            A tree of dicts, lists, texts and numbers; ``schema`` comes first.
        """
        content = asdict(self)
        return {"schema": content.pop("schema"), "version": content.pop("version"), **content}

    def to_json(self) -> str:
        r"""The content of a ``*.pss.json`` file.

        Returns:
            Indented JSON that ends in a line break; numbers are finite.
        """
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Report":
        r"""Read what :meth:`to_json` wrote.

        Args:
            text: JSON of this schema; fields that are not known here are passed over.

        Returns:
            An equal report.

        Raises:
            ValueError: the text has another schema.
        """
        content = json.loads(text)
        found = content.get("schema") if isinstance(content, dict) else None
        if found != SCHEMA:
            raise ValueError(f"the report has the schema {found!r}, this version reads {SCHEMA!r}")
        try:
            return cls(**_parsed(content))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the report is damaged: {str(error)[:100]}") from None


def _parsed(content: Mapping[str, Any]) -> dict[str, Any]:
    optimizer = _known(OptimizerReport, content["optimizer"])
    return {
        **_known(Report, content),
        "tensors": tuple(_tensor(entry) for entry in content["tensors"]),
        "restored": {name: Restored(**_known(Restored, entry)) for name, entry in content["restored"].items()},
        "drift": tuple(_drift(entry) for entry in content["drift"]),
        "notes": tuple(content.get("notes", ())),  # reports of earlier versions have none
        "optimizer": OptimizerReport(
            **{**optimizer, "reset": tuple(optimizer["reset"]), "masters": tuple(optimizer["masters"])}
        ),
    }


def _known(kind: type, entry: Mapping[str, Any]) -> dict[str, Any]:
    return {known.name: entry[known.name] for known in fields(kind) if known.name in entry}


def report_path(output: Path) -> Path:
    r"""Where the report of an output lies.

    Args:
        output: the repaired checkpoint.

    Returns:
        The path beside it.

    Example:
        >>> report_path(Path("runs/x.repaired.safetensors")).name
        'x.repaired.safetensors.pss.json'
    """
    return output.with_name(output.name + REPORT_SUFFIX)


def _tensor(entry: Mapping[str, Any]) -> TensorReport:
    matrices = tuple(_matrix(MatrixReport, matrix) for matrix in entry["matrices"])
    return TensorReport(**{**_known(TensorReport, entry), "shape": tuple(entry["shape"]), "matrices": matrices})


def _drift(entry: Mapping[str, Any]) -> TensorDrift:
    matrices = tuple(_matrix(MatrixDrift, matrix) for matrix in entry["matrices"])
    return TensorDrift(**{**_known(TensorDrift, entry), "matrices": matrices})


def _matrix(kind: type[_M], entry: Mapping[str, Any]) -> _M:
    pairs = {key: tuple(entry[key]) for key in ("shape", "stable_rank", "spectral_norm")}
    return kind(**{**_known(kind, entry), **pairs})
