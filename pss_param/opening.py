# SPDX-License-Identifier: Apache-2.0
r"""Opening the gates of views, and what has to exist before their next read.

# Note [Two graphs]
A compiled program has one graph for each combination of open gates that it meets, and a compiler gives up after eight.
A detector that names single weights would meet a new combination at nearly every trigger. So where compiled programs
read the weights, all gates move together: those that are not to be smoothed stand by, with factors of zeros. The
program then has one graph for closed gates and one for open ones, and a weight that stands by is never written.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from pss_param.resharding import ThinSaving, reshard, resting_layout
from pss_param.sharded import is_sharded
from pss_param.slot import Slot
from pss_param.together import Together, may_join
from pss_param.view import SmoothingView

__all__ = ["open_views", "stand_by"]


def open_views(
    model: nn.Module,
    slots: Mapping[str, list[Slot]],
    views: Mapping[SmoothingView, tuple[Tensor, ...]],
    eager: bool,
    padded_rank: int,
) -> int:
    r"""Open gates; compute directions now, as compiled programs need them, or leave that to the next read.

    Args:
        model: The guarded model.
        slots: Where each view sits, by its label.
        views: Those to open, with their levels if the detector keeps any.
        eager: Whether to compute directions now; then call :func:`stand_by` too.
        padded_rank: The rank that prepared factors had so far.

    Returns:
        The rank they have now: one for all views, a power of two that only grows, since every change is a new graph.
    """
    reshard(model)
    for view, levels in views.items():
        view.open(levels)
        slot = slots[view.label][0]
        view.resting = resting_layout(model, slot.module, slot.weight)
    _join(slots, views)
    if not eager:
        for view in views:
            if view.resting is not None:
                view.thin = ThinSaving(view, slots[view.label][0].module)
        return padded_rank
    for view in views:
        view.prepare(slots[view.label][0].weight)
    ranks = [pair.right.shape[-2] for view in views for pair in view.factors or ()]
    return max(padded_rank, 1 << (max(ranks, default=1) - 1).bit_length())


def _join(slots: Mapping[str, list[Slot]], views: Iterable[SmoothingView]) -> None:
    """Let views whose weights are whole at any time find their directions together."""
    members = {}
    for view in views:
        slot = slots[view.label][0]
        whole = view.resting is None and not is_sharded(slot.weight)
        if whole and may_join(slot.weight, view.smoothing):
            members[view] = (slot.module, slot.name)
    if len(members) > 1:
        together = Together(members)
        for view in members:
            view.together = together


def stand_by(
    model: nn.Module, slots: Mapping[str, list[Slot]], views: Iterable[SmoothingView], padded_rank: int
) -> None:
    r"""Give all views of a model factors of one rank, those that stay closed zeros; see Note [Two graphs].

    Args:
        model: The guarded model.
        slots: Where each view sits, by its label.
        views: All views of the guard.
        padded_rank: The rank.
    """
    for view in views:
        slot = slots[view.label][0]
        if view.is_open:
            view.pad_factors(padded_rank)
        else:
            view.resting = resting_layout(model, slot.module, slot.weight)
            view.stand_by(slot.weight, padded_rank)
