# SPDX-License-Identifier: Apache-2.0
r"""Checking a repaired checkpoint again, from its bytes alone, against its report and its source."""

import glob
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pss_param.checkpoint import Layout, open_checkpoint
from pss_param.checkpoint.checking import first_difference, untouched
from pss_param.errors import ArgumentError, CheckpointError
from pss_param.finite import count_nonfinite
from pss_param.options import Progress, ProgressHook, Stage
from pss_param.plan import make_plan
from pss_param.report import Report, TensorReport, report_path
from pss_param.scan import measure_matrices
from pss_param.selection import Target, TargetRules
from pss_param.surgery import digest
from pss_param.version import __version__

SCHEMA = "pss-param/verify-report/1"
MAX_REPORT = 1_000_000_000

TOLERANCE = 0.01
"""Relative difference of a measured stable rank or spectral norm from the reported one that is still equal."""


@dataclass(frozen=True)
class Verification:
    r"""What a check found.

    Args:
        output: path of the repaired checkpoint.
        source: path of its source, or None where it was not compared.
        checked: how many tensors the report vouches for and that were read again.
        compared: how many bytes were compared with the source.
        problems: one sentence each; empty where all is as the report says.
        origin: what the report says that the output was made from.
        wrong_source: whether ``source`` is another path than ``origin``, and nothing but its bytes does not fit.
    """

    output: str
    source: str | None
    checked: int
    compared: int
    problems: tuple[str, ...]
    origin: str | None = None
    wrong_source: bool = False
    version: str = __version__
    schema: str = SCHEMA

    def to_json(self) -> str:
        r"""The outcome for machines.

        Returns:
            Indented JSON that ends in a line break.
        """
        content: dict[str, Any] = asdict(self)
        ordered = {"schema": content.pop("schema"), "version": content.pop("version"), **content}
        return json.dumps(ordered, indent=1) + "\n"


def verify_checkpoint(
    output: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    *,
    progress: ProgressHook | None = None,
) -> Verification:
    r"""Compare a repaired checkpoint with the report beside it and, if given, with its source.

    Against the report: every changed tensor has the reported bytes (SHA-256), is finite, and measures as
    reported. Against the source: all other bytes of all files are equal, check sums of zip files apart.

    Args:
        output: the repaired checkpoint.
        source: what it was made from, or None.
        progress: told of every step.

    Returns:
        The outcome; what does not fit is in its ``problems``. A report or a checkpoint that cannot be read
        raises :class:`CheckpointError`.

    Raises:
        CheckpointError: there is no output.
    """
    where = Path(os.path.abspath(output))
    if not where.exists():
        raise CheckpointError(f"{output} does not exist; check the path")
    report = read_report(report_path(where))
    with open_checkpoint(where) as layout:
        digests = reported_digests(report)
        problems = [*_check_digests(layout, digests, progress), *_check_measures(layout, report)]
        compared = 0
        found: list[str] = []
        if source is not None:
            with open_checkpoint(source) as before:
                compared, found = _check_source(before, layout, list(digests), progress)
        stranger = bool(found) and not problems and not _same_path(source, report.source)
        named = None if source is None else str(source)
        everything = (*problems, *found)
    return Verification(str(output), named, len(digests), compared, everything, report.source, stranger)


def _same_path(one: str | os.PathLike[str] | None, other: str | None) -> bool:
    return one is None or other is None or os.path.realpath(one) == os.path.realpath(other)


def read_report(path: Path) -> Report:
    r"""Read the report beside a repaired checkpoint.

    Args:
        path: the ``*.pss.json`` file.

    Returns:
        The report.

    Raises:
        CheckpointError: it is not there or is no report of this schema.
    """
    if not path.is_file() or path.stat().st_size > MAX_REPORT:
        raise CheckpointError(
            f"{path} is not there; only a checkpoint with the report that pss-repair wrote is verified"
        )
    try:
        return Report.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a usable report: {error}") from None


def reported_digests(report: Report) -> dict[str, str]:
    r"""The fingerprints that a report vouches for.

    Args:
        report: the report.

    Returns:
        SHA-256 by key of every tensor that was written: weights, restored ones, vectors, and the optimizer's.
    """
    digests = {tensor.name: tensor.digest for tensor in report.tensors if tensor.changed}
    digests.update({name: restored.digest for name, restored in report.restored.items()})
    return {**digests, **report.vectors, **report.optimizer.written}


def _check_digests(layout: Layout, digests: Mapping[str, str], progress: ProgressHook | None) -> Iterator[str]:
    for number, (name, expected) in enumerate(digests.items()):
        if progress is not None:
            progress(Progress("verify", name, number, len(digests)))
        if name not in layout.tensors and name not in layout.state:
            yield f"{name} is not there"
        elif layout.find(name).dtype is None or digest(layout.read(name)) != expected:
            yield f"{name} has other bytes than the report says"
        elif layout.find(name).floating and (count := count_nonfinite(layout.blocks(name))):
            yield f"{name} holds {count} NaN or infinite value(s)"


def _check_measures(layout: Layout, report: Report) -> Iterator[str]:
    wanted = {tensor.name: tensor for tensor in report.tensors if tensor.name in layout.tensors}
    options = report.options
    rules = TargetRules(
        preset=options["targets"],
        include=tuple(options["include"]),
        exclude=tuple(options["exclude"]),
        per_head=options["per_head"],
    )
    targets = _targets_of(layout, rules, wanted, deep=options.get("strength") == "deep")
    for name, tensor in wanted.items():
        if name not in targets:
            yield f"{name} is a target of the report, but is none here"
        elif not count_nonfinite(layout.blocks(name)):
            yield from _check_tensor(layout, targets[name], tensor)


def _targets_of(layout: Layout, rules: TargetRules, wanted: Iterable[str], deep: bool) -> Mapping[str, Target]:
    """Those of a plan; what a config told the repair to take, which may be missing here, is taken by its name."""
    targets = make_plan(layout, rules, deep=deep).targets
    others = tuple(glob.escape(name) for name in wanted if name not in targets)
    if not others:
        return targets
    try:
        return {**targets, **make_plan(layout, replace(rules, preset="none", include=others)).targets}
    except ArgumentError:  # what cannot be taken at all is a problem of the report
        return targets


def _check_tensor(layout: Layout, target: Any, tensor: TensorReport) -> Iterator[str]:
    rows = {row.part: row for row in measure_matrices(layout, target, "cpu")}
    for matrix in tensor.matrices:
        row = rows.get(matrix.part)
        if row is None:
            yield f"{tensor.name} has no matrix {matrix.part!r}"
            continue
        for word, said, seen in (
            ("stable rank", matrix.stable_rank[1], row.stable_rank),
            ("spectral norm", matrix.spectral_norm[1], row.spectral_norm),
        ):
            if abs(seen - said) > TOLERANCE * max(abs(said), 1e-12):
                yield f"{tensor.name} {matrix.part}: {word} is {seen:.4g}, the report says {said:.4g}"


def _check_source(
    before: Layout, after: Layout, written: list[str], progress: ProgressHook | None
) -> tuple[int, list[str]]:
    if before.path.is_dir() != after.path.is_dir():
        return 0, ["one of output and source is a folder and the other a file"]
    if set(before.files) != set(after.files) and before.path.is_dir():
        odd = sorted(set(before.files) ^ set(after.files))
        return 0, [f"{len(odd)} file(s) are in only one of output and source, first {odd[0]}"]
    patches: dict[str, list[tuple[int, int]]] = {}
    for name in written:
        if name in before.tensors or name in before.state:
            for chunk in before.find(name).chunks:
                size = chunk.span * before.dtype(name).itemsize
                patches.setdefault(chunk.file, []).append((chunk.offset, size))
    compared, problems = 0, []
    # A file has another name in the output than in the source; the files of folders have the same.
    pairs = zip(before.files, before.files if before.path.is_dir() else after.files, strict=True)
    total = sum(before.stat(file).st_size for file in before.files)
    for file, twin in pairs:
        size = before.stat(file).st_size
        if size != after.stat(twin).st_size:
            problems.append(f"{file} has {size} bytes in the source, {after.stat(twin).st_size} in the output")
            continue
        mine = patches.get(file, [])
        mine = [*mine, *before.mended(file, mine)] if mine else []
        step = _counter(progress, "verify", compared, total)
        at = first_difference(before.fd(file), after.fd(twin), untouched(size, mine), step)
        if at is not None:
            problems.append(f"{file} differs from the source at or after byte {at}, where nothing was repaired")
        compared += size - sum(count for _, count in mine)
    return compared, problems


def _counter(progress: ProgressHook | None, stage: Stage, start: int, total: int) -> Any:
    done = start

    def advance(step: int) -> None:
        nonlocal done
        done += step
        if progress is not None:
            progress(Progress(stage, "", done, total))

    return advance
