# SPDX-License-Identifier: Apache-2.0
r"""What a repair did, as data: the content of the ``*.pss.json`` file beside every repaired checkpoint.

The schema is versioned by :data:`SCHEMA`. A field is never renamed or removed within a version; new ones may
come.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pss_param.version import __version__

SCHEMA = "pss-param/repair-report/1"
SUFFIX = ".pss.json"


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
    """

    name: str
    role: str
    block: int | None
    dtype: str
    shape: tuple[int, ...]
    changed: bool
    relative_change: float
    matrices: tuple[MatrixReport, ...]

    @property
    def worst(self) -> MatrixReport:
        r"""The matrix whose stable rank was the lowest."""
        return min(self.matrices, key=lambda matrix: matrix.stable_rank[0])


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
    version: str = __version__
    schema: str = field(default=SCHEMA)

    @property
    def changed(self) -> tuple[str, ...]:
        r"""Names of the tensors whose bytes differ from the input's."""
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
            text: JSON of this schema.

        Returns:
            An equal report.

        Raises:
            ValueError: the text has another schema.
        """
        content = json.loads(text)
        if content.get("schema") != SCHEMA:
            raise ValueError(f"the report has the schema {content.get('schema')!r}, this version reads {SCHEMA!r}")
        content["tensors"] = tuple(_tensor(entry) for entry in content["tensors"])
        return cls(**content)


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
    return output.with_name(output.name + SUFFIX)


def _tensor(entry: dict[str, Any]) -> TensorReport:
    matrices = tuple(_matrix(matrix) for matrix in entry.pop("matrices"))
    return TensorReport(**{**entry, "shape": tuple(entry["shape"]), "matrices": matrices})


def _matrix(entry: dict[str, Any]) -> MatrixReport:
    pairs = {key: tuple(entry[key]) for key in ("shape", "stable_rank", "spectral_norm")}
    return MatrixReport(**{**entry, **pairs})
