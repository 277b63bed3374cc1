# SPDX-License-Identifier: Apache-2.0
"""Everything that a person could do about divergence, by name; each in its standard form, with its source."""

from collections.abc import Callable

from .attention import QKClip, QKNorm
from .base import Method
from .clipping import GradientClipping, ZClip
from .guarded import FORMS
from .matrices import MSign, SoftOrthogonality
from .rates import HalveRate, NoWeightDecay, WarmUp
from .reparametrised import SigmaReparam, SpectralNormalisation
from .skipping import SkipOutliers

METHODS: dict[str, Callable[[], Method]] = {
    "nothing": Method,
    "clip-1.0": GradientClipping,
    "zclip": ZClip,
    "skip-6sigma": SkipOutliers,
    "halve-lr": HalveRate,
    "warmup": WarmUp,
    "no-weight-decay": NoWeightDecay,
    "orthogonal": SoftOrthogonality,
    "spectral-norm": SpectralNormalisation,
    "sigma-reparam": SigmaReparam,
    "qk-norm": QKNorm,
    "qk-clip": QKClip,
    "qk-clip-30": lambda: QKClip(threshold=30.0),
    "msign": MSign,
    "msign-100": lambda: MSign(period=100),
    **FORMS,
}
"""Makers of methods; a method serves one run."""

__all__ = ["METHODS", "Method"]
