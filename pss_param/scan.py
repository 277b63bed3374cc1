# SPDX-License-Identifier: Apache-2.0
r"""Which matrices of a checkpoint stand out, and whether that is damage."""

# Note [What counts as damage]
# A low stable rank alone is no illness: single matrices of healthy networks reach 1.5. Four findings count:
#
# 1. NaN or infinity in the floating-point tensors, but for masks and what is excluded: Note [Infinities by design].
# 2. *Collapse of the network*: the median stable rank over all scanned matrices with both sides of at least 32 is
#    below 3. A single low one does not move a median.
# 3. *Outlier of its role*: among at least four matrices of the same role and shape in other layers, one has at most
#    half the median stable rank, at least twice the median spectral norm, and both lie more than five robust
#    standard deviations from the median, on a logarithmic scale. Either alone is marked in the table, not counted.
# 4. *Fall against a healthy checkpoint*, where one is given: the median over all targets of the ratio of stable ranks
#    is below ``drifted_below``. A collapse that struck all layers alike may show in no other way.
#
# Matrices that have all outgrown fresh ones are told, because a repair would then be deep, but not counted: healthy
# networks after very long training look like that too (:mod:`pss_param.strength`).
#
# The robust standard deviation is 1.4826 times the median absolute deviation from the median of the *other* layers,
# and at least log(1.1), because the layers of a fresh network are so alike that any difference would be many sigmas.

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from pss_param.by_design import notes_of, why_left
from pss_param.checkpoint import Layout, open_checkpoint
from pss_param.counting import counted
from pss_param.drift import measure_drift
from pss_param.errors import NonFiniteError
from pss_param.finite import count_nonfinite
from pss_param.optimizer_edit import OptimizerEditor
from pss_param.options import Progress, ProgressHook, RepairOptions, pick_device
from pss_param.plan import TensorSource, make_plan
from pss_param.reference import HealthySource
from pss_param.report import TensorDrift
from pss_param.spectrum import spectral_norm, stable_rank
from pss_param.strength import measure_growth
from pss_param.surgery import parts_of
from pss_param.targets import Target
from pss_param.version import __version__

SCHEMA = "pss-param/scan-report/1"
COLLAPSED = 3.0
PEERS = 4
SIGMAS = 5.0
SIDE = 32


@dataclass(frozen=True)
class ScanRow:
    r"""One matrix.

    Args:
        name: key of its tensor.
        part: which matrix of the tensor; empty where there is only one.
        role: what it does in the model.
        block: index of its layer, or None.
        shape: ``(m, n)``.
        stable_rank: dimensionless.
        spectral_norm: in the units of the weight.
        stable_rank_ratio: to the median of its peers, or None where it has too few.
        spectral_norm_ratio: likewise.
        note: what stands out, or empty.
        damaged: whether it is an outlier of its role (Note [What counts as damage]).
    """

    name: str
    part: str
    role: str
    block: int | None
    shape: tuple[int, int]
    stable_rank: float
    spectral_norm: float
    stable_rank_ratio: float | None = None
    spectral_norm_ratio: float | None = None
    note: str = ""
    damaged: bool = False


@dataclass(frozen=True)
class ScanReport:
    r"""What a scan found.

    Args:
        source: path of the checkpoint.
        format: its format.
        rows: one per matrix, in the checkpoint's order.
        skipped: reasons by tensor name.
        nonfinite: number of NaN and infinite elements by tensor name, where they are damage.
        median_stable_rank: over the matrices with both sides of at least 32, or None without any.
        findings: one sentence per kind of damage; empty for a sound checkpoint.
        drift: how far each target has moved from the reference; empty without one.
        growth: median spectral norm of the matrices inside the blocks over that of fresh ones, or of the reference's,
            dimensionless; None where a repair with the same options would not look at it.
        reason: the strength that such a repair would choose by it, and why, in the repair's words; empty likewise.
        notes: what is no damage but should be known, one sentence each.
    """

    source: str
    format: str
    rows: tuple[ScanRow, ...]
    skipped: Mapping[str, str]
    nonfinite: Mapping[str, int]
    median_stable_rank: float | None
    findings: tuple[str, ...]
    drift: tuple[TensorDrift, ...] = ()
    growth: float | None = None
    reason: str = ""
    notes: tuple[str, ...] = ()
    version: str = __version__
    schema: str = SCHEMA

    @property
    def damaged(self) -> bool:
        r"""Whether anything was found; ``pss-repair scan`` then exits with 3."""
        return bool(self.findings)

    def to_json(self) -> str:
        r"""The report for machines.

        Returns:
            Indented JSON that ends in a line break.
        """
        content: dict[str, Any] = asdict(self)
        ordered = {"schema": content.pop("schema"), "version": content.pop("version"), **content}
        return json.dumps(ordered, indent=1, allow_nan=False) + "\n"


def scan_checkpoint(
    path: str | os.PathLike[str],
    options: RepairOptions | None = None,
    *,
    progress: ProgressHook | None = None,
) -> ScanReport:
    r"""Measure every target matrix and compare it with those of the same role in other layers.

    Args:
        path: the checkpoint; only read.
        options: ``targets``, ``include``, ``exclude``, ``per_head``, ``device`` and ``reference`` count here;
            None for the defaults.
        progress: told of every tensor.

    Returns:
        The report.

    Non-finite tensors are findings, not errors; a checkpoint that cannot be read raises
    :class:`CheckpointError`.
    """
    options = options or RepairOptions()
    with open_checkpoint(path) as layout, HealthySource(options.reference, layout.tensors) as reference:
        plan = make_plan(layout, options.rules())
        device = pick_device(options.device)
        rows: list[ScanRow] = []
        drift: list[TensorDrift] = []
        nonfinite: dict[str, int] = {}
        left: dict[str, str] = {}
        floats = {name: stored for name, stored in layout.tensors.items() if stored.floating}
        total, done = sum(stored.nbytes for stored in floats.values()), 0
        for name, stored in floats.items():
            if progress is not None:
                progress(Progress("scan", name, done, total))
            if count := count_nonfinite(layout.blocks(name)):
                why = "" if name in plan.targets else why_left(layout, [name], options.exclude, count)
                if why:
                    left[name] = why
                else:
                    nonfinite[name] = count
            elif name in plan.targets:
                rows += _measured(layout, plan.targets[name], device)
                if reference.present:
                    drift.append(_drift(layout, plan.targets[name], reference, device))
            done += stored.nbytes
        nonfinite |= OptimizerEditor(layout, "keep").nonfinite()
        compared = compare_layers(rows)
        level = _median_rank(compared)
        findings = (*_findings(compared, nonfinite, level), *_falls(drift, options.drifted_below))
        parts = (compared, {**plan.skipped, **left}, nonfinite, level, findings, tuple(drift))
        growth = _outgrown(layout, options)
        return ScanReport(str(path), layout.format, *parts, *growth, notes=(*layout.notes, *notes_of(left)))


def _outgrown(layout: Layout, options: RepairOptions) -> tuple[float | None, str]:
    growth = measure_growth(layout, options) if options.open else None
    return (growth.times, growth.reason) if growth is not None and growth.seen else (None, "")


def _measured(layout: Layout, target: Target, device: torch.device) -> list[ScanRow]:
    try:
        return measure_matrices(layout, target, device)
    except NonFiniteError as error:  # its elements are finite, its norm is not
        raise NonFiniteError(f"{layout.path}: {target.name}: {error}") from None


def _drift(layout: Layout, target: Target, reference: HealthySource, device: torch.device) -> TensorDrift:
    healthy = reference.get(target.name, layout.tensors[target.name].shape)
    return measure_drift(target, layout.read(target.name).to(device), healthy.to(device))


def measure_matrices(source: TensorSource, target: Target, device: torch.device | str) -> list[ScanRow]:
    r"""Measure all matrices of a stored tensor.

    Args:
        source: where it is.
        target: what it is.
        device: where to compute.

    Returns:
        One row per matrix, not yet compared with others.
    """
    rows = []
    for part in parts_of(target, source.read(target.name).to(device)):
        for index in part.indices:
            matrix = part.values[index]
            shape = (matrix.shape[-2], matrix.shape[-1])
            rank, norm = float(stable_rank(matrix)), float(spectral_norm(matrix))
            rows.append(ScanRow(target.name, part.label(index), target.role, target.block, shape, rank, norm))
    return rows


def compare_layers(rows: Sequence[ScanRow]) -> tuple[ScanRow, ...]:
    r"""Compare each matrix with those of the same role, part and shape.

    Args:
        rows: measured matrices.

    Returns:
        The same rows in the same order, with ratios, notes and damage filled in. See Note [What counts as
        damage].

    Example:
        >>> good = [ScanRow(f"{i}.up", "", "up", i, (64, 64), 20.0 + i, 2.0) for i in range(6)]
        >>> bad = ScanRow("6.up", "", "up", 6, (64, 64), 1.2, 30.0)
        >>> [row.name for row in compare_layers([*good, bad]) if row.damaged]
        ['6.up']
    """
    groups: dict[tuple[str, str, tuple[int, int]], list[ScanRow]] = {}
    for row in rows:
        groups.setdefault((row.role, row.part, row.shape), []).append(row)
    return tuple(_compare(row, groups[row.role, row.part, row.shape]) for row in rows)


def _compare(row: ScanRow, group: Sequence[ScanRow]) -> ScanRow:
    peers = [other for other in group if other is not row]
    if len(peers) < PEERS or row.spectral_norm == 0:
        return ScanRow(**{**_fields(row), "note": "zero" if row.spectral_norm == 0 else ""})
    rank, rank_sigmas = _deviation(row.stable_rank, (peer.stable_rank for peer in peers))
    norm, norm_sigmas = _deviation(row.spectral_norm, (peer.spectral_norm for peer in peers))
    low = rank <= 0.5 and rank_sigmas < -SIGMAS
    high = norm >= 2.0 and norm_sigmas > SIGMAS
    words = [f"stable rank {rank:.2g} x"] * low + [f"spectral norm {norm:.2g} x"] * high
    note = f"{' and '.join(words)} the median of {len(peers)} peers" if words else ""
    found = {"stable_rank_ratio": rank, "spectral_norm_ratio": norm, "note": note, "damaged": low and high}
    return ScanRow(**{**_fields(row), **found})


def _deviation(value: float, peers: Iterable[float]) -> tuple[float, float]:
    # Ratio to the median, and robust standard deviations from it on a logarithmic scale.
    logs = [math.log(peer) for peer in peers if peer > 0]
    if not logs:
        return math.inf, math.inf
    middle = median(logs)
    spread = max(1.4826 * median([abs(log - middle) for log in logs]), math.log(1.1))
    distance = math.log(value) - middle
    return math.exp(distance), distance / spread


def _fields(row: ScanRow) -> dict[str, Any]:
    return {name: getattr(row, name) for name in row.__dataclass_fields__}


def _median_rank(rows: Iterable[ScanRow]) -> float | None:
    ranks = [row.stable_rank for row in rows if min(row.shape) >= SIDE]
    return median(ranks) if ranks else None


def _findings(rows: Sequence[ScanRow], nonfinite: Mapping[str, int], level: float | None) -> Iterable[str]:
    if nonfinite:
        yield f"{len(nonfinite)} tensor(s) hold NaN or infinity, first {next(iter(nonfinite))}"
    if level is not None and level < COLLAPSED:
        yield f"the median stable rank is {level:.2f}, below {COLLAPSED:g}: the whole network has collapsed"
    if outliers := [row.name for row in rows if row.damaged]:
        those = counted(len(outliers), "matrix stands out from its", "matrices stand out from their")
        yield f"{those} peers in both measures, first {outliers[0]}"


def _falls(drift: Sequence[TensorDrift], below: float) -> Iterable[str]:
    if not drift:
        return
    ratio = median(row.worst.ratio for row in drift)
    if ratio < below:
        yield f"the median stable rank is {ratio:.2f} x the healthy checkpoint's, below {below:g}"
