# SPDX-License-Identifier: Apache-2.0
r"""Try several repairs on what counts: the loss of a short run from each.

No figure of a checkpoint tells for certain how strong a repair has to be: after very long training healthy matrices
look like those of a dead run (:mod:`pss_param.strength`). A few hundred steps at a healthy learning rate do.
"""

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pss_param.options import RepairOptions
from pss_param.repair import repair_checkpoint, repair_state_dict
from pss_param.report import Report

CANDIDATES = (None, RepairOptions(strength="gentle"), RepairOptions(strength="deep"))
"""What is tried if nobody says otherwise; None leaves the checkpoint as it is."""

Source = TypeVar("Source", str, os.PathLike[str], dict[str, Any])


@dataclass(frozen=True)
class Trial:
    r"""One repair that was tried.

    Args:
        options: how; None for the checkpoint as it is.
        loss: what the judge said of it.
        report: what the repair did; None for the checkpoint as it is.
    """

    options: RepairOptions | None
    loss: float
    report: Report | None


def probe_repairs(
    source: Source,
    judge: Callable[[Source], float],
    candidates: Sequence[RepairOptions | None] = CANDIDATES,
) -> tuple[Trial, ...]:
    r"""Repair a checkpoint in several ways and let a short run judge each.

    Args:
        source: a checkpoint of any format that :func:`pss_param.repair_checkpoint` takes, or a state dict.
        judge: trains on from what it is given, for some hundred steps at a healthy learning rate, and returns the
            mean training loss of the last of them, or a held-out loss; lower is better, and NaN or infinity is worst.
            For a path it gets the path of a repaired copy with the same file name, beside the source and gone
            afterwards: one copy at a time. For a state dict it gets a state dict whose unchanged tensors are those of
            ``source``: it loads them into a model and leaves them as they are.
        candidates: the repairs; None for the checkpoint as it is.

    Returns:
        The trials, best first; of equals the earlier candidate. Repair with the options of the first, or leave the
        checkpoint alone if they are None.

    Example:
        >>> import torch
        >>> sick = {"layers.0.mlp.up_proj.weight": torch.randn(64, 64).index_fill_(0, torch.tensor(3), 9.0)}
        >>> best, *others = probe_repairs(sick, lambda state: float(state["layers.0.mlp.up_proj.weight"].norm()))
        >>> best.options.strength, len(others)
        ('deep', 2)
    """
    trials = [trial for options in candidates for trial in _tried(source, judge, options)]
    return tuple(sorted(trials, key=lambda trial: trial.loss if math.isfinite(trial.loss) else math.inf))


def _tried(source: Any, judge: Callable[[Any], float], options: RepairOptions | None) -> Iterator[Trial]:
    if options is None:
        yield Trial(None, float(judge(source)), None)
    elif isinstance(source, Mapping):
        repaired, report = repair_state_dict(source, options)
        yield Trial(options, float(judge(repaired)), report)
    else:
        path = Path(source)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.trial-", dir=path.absolute().parent) as folder:
            report = repair_checkpoint(path, Path(folder) / path.name, options)
            yield Trial(options, float(judge(type(source)(report.output))), report)
