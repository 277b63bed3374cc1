# SPDX-License-Identifier: Apache-2.0
r"""What a guard saves besides the model, and what it demands of a state before it takes it back."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from pss_param.detector import Detector
from pss_param.errors import ArgumentError

__all__ = ["check_state", "copied_state"]


def copied_state(detector: Detector) -> dict[str, Any]:
    r"""Take a detector's state out as tensors of its own, so that the next step does not change what was saved.

    Args:
        detector: The detector.

    Returns:
        Its ``state_dict``, copied.

    Example:
        >>> from pss_param.detector import GradientNormRatio
        >>> copied_state(GradientNormRatio())["count"]
        tensor(0)
    """
    return {key: _copy(value) for key, value in detector.state_dict().items()}


def check_state(state: Mapping[str, Any], names: Collection[str], detector: Detector) -> None:
    r"""Refuse a state that belongs to another guard.

    Args:
        state: What :meth:`pss_param.Guard.state_dict` returned.
        names: The weights of the guard that is to take it.
        detector: Its detector.

    Raises:
        ArgumentError: If it belongs to other weights or another detector, or lacks an entry.
    """
    missing = {"detector", "counters", "openings"} - set(state)
    if missing:
        raise ArgumentError(f"a guard's state has detector, counters, openings; missing: {sorted(missing)}")
    differing = sorted(set(state["openings"]) ^ set(names))
    if differing:
        raise ArgumentError(
            f"the saved guard and this one watch different weights, among them {differing[0]}; "
            "attach with the same targets before loading"
        )
    differing = sorted(set(state["detector"]) ^ set(detector.state_dict()))
    if differing:
        raise ArgumentError(
            f"the saved guard has another detector than {type(detector).__name__}, they differ in "
            f"{differing[0]}; attach with the same detector before loading"
        )


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
