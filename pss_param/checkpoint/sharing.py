# SPDX-License-Identifier: Apache-2.0
r"""Which tensors of a file share elements, so that each element is repaired once.

Tensors over one storage need not overlap: a flat parameter's slices and the halves of a split matrix lie side
by side, tied weights lie on each other.
"""

from collections.abc import Hashable, Mapping

import torch

from .torch_tensors import View

MASK_BUDGET = 1 << 28
"""Elements that are compared one by one in a file; beyond it, tensors whose spans overlap count as shared."""

MAX_PAIRS = 10_000
"""Pairs that are compared in a file; beyond it, as above."""


class Sharing:
    r"""Groups tensors over the same storages.

    Args:
        views: the tensors by any key.

    Example:
        >>> whole = View("0", 64, torch.float32, 0, (4, 4), (4, 1))
        >>> left = View("0", 64, torch.float32, 0, (4, 2), (4, 1))
        >>> right = View("0", 64, torch.float32, 2, (4, 2), (4, 1))
        >>> halves = Sharing({"left": left, "right": right})
        >>> halves.group("left") == halves.group("right")
        False
        >>> all_three = Sharing({"left": left, "right": right, "whole": whole})
        >>> all_three.group("left") == all_three.group("right")
        True
    """

    def __init__(self, views: Mapping[str, View]) -> None:
        r"""See the class."""
        self._views = dict(views)
        self._parents: dict[View, View] = {}
        for view in self._views.values():
            self._parents.setdefault(view, view)
        self._budget, self._pairs = MASK_BUDGET, MAX_PAIRS
        by_storage: dict[str, list[View]] = {}
        for view in self._parents:
            if view.span:
                by_storage.setdefault(view.storage, []).append(view)
        for members in by_storage.values():
            if len(members) > 1:
                self._sweep(sorted(members, key=lambda view: view.begin))

    def group(self, key: str) -> Hashable:
        r"""Find the group of a tensor.

        Args:
            key: which tensor.

        Returns:
            Equal for two tensors that share elements, directly or through others, different otherwise.
        """
        view = self._views[key]
        if not view.span:
            return ("empty", key)
        root = self._root(view)
        return (root.storage, root.offset, root.shape, root.strides, str(root.dtype))

    def _sweep(self, members: list[View]) -> None:
        open_views: list[View] = []
        furthest = members[0]
        for view in members:
            if self._pairs <= 0 or self._budget <= 0:
                # Cautious: what may overlap counts as one.
                if view.begin < furthest.end:
                    self._join(view, furthest)
            else:
                open_views = [other for other in open_views if other.end > view.begin]
                for other in open_views:
                    if self._overlap(view, other):
                        self._join(view, other)
                open_views.append(view)
            furthest = max(furthest, view, key=lambda view: view.end)

    def _overlap(self, one: View, other: View) -> bool:
        self._pairs -= 1
        both_dense = one.chunk("", 0).contiguous and other.chunk("", 0).contiguous
        if both_dense or one.dtype != other.dtype or self._root(one) is self._root(other):
            return True
        first = min(one.offset, other.offset)
        length = max(view.offset + view.span for view in (one, other)) - first
        self._budget -= length
        if self._budget <= 0:
            return True
        mask = torch.zeros(length, dtype=torch.bool)
        mask.as_strided(one.shape, one.strides, one.offset - first).fill_(True)
        return bool(mask.as_strided(other.shape, other.strides, other.offset - first).any())

    def _join(self, one: View, other: View) -> None:
        self._parents[self._root(one)] = self._root(other)

    def _root(self, view: View) -> View:
        while self._parents[view] is not view:
            # Halving the way keeps later look-ups short.
            self._parents[view] = self._parents[self._parents[view]]
            view = self._parents[view]
        return view
