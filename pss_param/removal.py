# SPDX-License-Identifier: Apache-2.0
r"""Taking views off a model, and getting at them."""

from torch import nn

from pss_param.errors import StateError
from pss_param.resharding import reshard
from pss_param.slot import Slot, occupied_slots
from pss_param.view import SmoothingView

__all__ = ["detach", "view_at"]


def detach(model: nn.Module) -> None:
    r"""Fold and remove every view of a model; serves copies of guarded models, which have no guard.

    Args:
        model: The model; nothing happens when it has no views.

    Raises:
        StateError: If a backward pass runs, or a parametrization lies over a view.

    Example:
        >>> import copy
        >>> from pss_param.attaching import attach
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> guard = attach(model, targets="all")
        >>> twin = copy.deepcopy(model)
        >>> detach(twin)
        >>> type(twin[0]) is nn.Linear, guard.is_open
        (True, False)
    """
    reshard(model)
    occupied = list(occupied_slots(model))
    for slot, view in occupied:
        view.fold_(slot.weight)
    for slot, _ in occupied:
        slot.clear()


def view_at(slot: Slot) -> SmoothingView:
    r"""Get the view over a slot.

    Args:
        slot: The place.

    Returns:
        Its view.

    Raises:
        StateError: If there is none.
    """
    view = slot.module.get_submodule(f"parametrizations.{slot.name}.0")
    if not isinstance(view, SmoothingView):
        raise StateError(f"there is no view over {slot.name!r}; make guards with pss_param.attach")
    return view
