# SPDX-License-Identifier: Apache-2.0
r"""Parametric Singularity Smoothing: keep a training run from diverging, and repair the checkpoints of one that did.

Live, two lines in a training loop::

    guard = pss.attach(model)
    ...
    loss.backward()
    guard.step()
    optimizer.step()

Offline: ``pss.repair_checkpoint("checkpoint.safetensors")``, or ``pss-repair`` in a shell.

Example:
    >>> import torch, pss_param as pss
    >>> W = torch.diag(torch.tensor([8.0, 2.0, 2.0, 2.0]))
    >>> [round(float(pss.stable_rank(M)), 3) for M in (W, pss.smooth(W, rank=1))]
    [1.188, 4.0]
"""

from pss_param.attaching import attach
from pss_param.checkpoint.layout import Layout
from pss_param.checkpoint.sniff import open_checkpoint
from pss_param.compare import CompareReport, compare_checkpoints
from pss_param.detector import AnyOf, Detector, GradientNormRatio, Verdict
from pss_param.errors import ArgumentError, CheckpointError, NonFiniteError, PssError, StateError
from pss_param.estimate import stable_rank_estimate
from pss_param.event import Event
from pss_param.export import export, plain_state_dict
from pss_param.floor import StableRankFloor
from pss_param.guard import Guard, detach
from pss_param.lowrank import Correction
from pss_param.matricize import Matricization
from pss_param.options import Progress, RepairOptions
from pss_param.param_order import write_param_order
from pss_param.plain import export_checkpoint
from pss_param.policy import GuardPolicy
from pss_param.probe import Trial, probe_repairs
from pss_param.repair import repair_checkpoint, repair_state_dict
from pss_param.report import Report
from pss_param.scan import ScanReport, scan_checkpoint
from pss_param.smoothing import Smoothing, correction, smooth
from pss_param.spectrum import DominantDirections, dominant_directions, spectral_norm, stable_rank
from pss_param.targets import (
    Selection,
    Skipped,
    Target,
    TargetRules,
    TensorInfo,
    select_parameters,
    select_tensors,
)
from pss_param.verification import Verification, verify_checkpoint
from pss_param.version import __version__
from pss_param.view import SmoothingView

__all__ = [
    "AnyOf",
    "ArgumentError",
    "CheckpointError",
    "CompareReport",
    "Correction",
    "Detector",
    "DominantDirections",
    "Event",
    "GradientNormRatio",
    "Guard",
    "GuardPolicy",
    "Layout",
    "Matricization",
    "NonFiniteError",
    "Progress",
    "PssError",
    "RepairOptions",
    "Report",
    "ScanReport",
    "Selection",
    "Skipped",
    "Smoothing",
    "SmoothingView",
    "StableRankFloor",
    "StateError",
    "Target",
    "TargetRules",
    "TensorInfo",
    "Trial",
    "Verdict",
    "Verification",
    "__version__",
    "attach",
    "compare_checkpoints",
    "correction",
    "detach",
    "dominant_directions",
    "export",
    "export_checkpoint",
    "open_checkpoint",
    "plain_state_dict",
    "probe_repairs",
    "repair_checkpoint",
    "repair_state_dict",
    "scan_checkpoint",
    "select_parameters",
    "select_tensors",
    "smooth",
    "spectral_norm",
    "stable_rank",
    "stable_rank_estimate",
    "verify_checkpoint",
    "write_param_order",
]
