# SPDX-License-Identifier: Apache-2.0
r"""The watched weights as detectors see them: by name, as the matrices that they act as."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from pss_param.detector import Matrix
from pss_param.errors import StateError
from pss_param.sharded import ShardedMatrix, is_sharded
from pss_param.slot import Slot
from pss_param.view import SmoothingView

__all__ = ["require_no_pending", "watched_matrices"]


def watched_matrices(
    slots: Mapping[str, list[Slot]], views: Mapping[str, SmoothingView]
) -> dict[str, tuple[Matrix, ...]]:
    r"""Split every stored weight into its matrices, without a copy where that is possible.

    Args:
        slots: Where the weights are, by name.
        views: The views over them, by the same names.

    Returns:
        The matrices by name; a sharded matrix as the linear map that it is.
    """
    return {name: _matrices_of(slots[name][0].weight, view) for name, view in views.items()}


def _matrices_of(weight: Tensor, view: SmoothingView) -> tuple[Matrix, ...]:
    weight = weight.detach()
    if not is_sharded(weight):
        return view.matricization.split(weight)
    if view.matricization.linear:
        return (ShardedMatrix(weight),)
    return view.matricization.split(weight.full_tensor())


def require_no_pending(views: Sequence[SmoothingView]) -> None:
    r"""Make sure that no backward pass is to come for what was read in a preview.

    Args:
        views: The views whose gates the preview opened.

    Raises:
        StateError: If one is.
    """
    for view in views:
        if view.pending:
            raise StateError(
                f"{view.label} was read inside guard.preview() and its backward pass has not come; "
                "preview under torch.no_grad(), or call backward() inside"
            )
