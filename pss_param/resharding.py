# SPDX-License-Identifier: Apache-2.0
r"""Open views under FSDP2: which weight is at rest, and how an open view lets go of the whole weight.

# Note [At rest and in forward]
FSDP2 swaps the Parameter of a module: at rest a ``DTensor`` shard, inside forward and backward passes the whole
weight (or, over tensor parallelism, a ``DTensor`` on the smaller mesh). It reads ``module.weight`` itself when
parameters are moved or loaded, and takes what it gets for the shard. So at rest an open view shows the stored shard;
checkpoints get their smoothed values elsewhere. Before anything is opened or folded the model is resharded, or a
fold would go into a buffer that is thrown away.

# Note [Thin saving]
Autograd saves the weight of a matrix product for the backward pass. For a closed gate that is FSDP2's own buffer,
freed after forward and filled again before backward. For an open gate it would be the smoothed weight, a tensor of
our own, one whole weight per layer: the memory that sharding had saved. So inside the forward of a module whose gate
is open, autograd keeps a recipe: FSDP2's buffer and the thin factors, from which backward makes the same bits again.
Where someone else decides what is saved (activation checkpointing, offloading), they go on deciding.
"""

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from pss_param.sharded import Layout, is_sharded

if TYPE_CHECKING:
    from pss_param.factors import Factors
    from pss_param.view import SmoothingView

__all__ = ["ThinSaving", "fully_sharded", "reshard", "resting_layout"]


def fully_sharded(model: nn.Module) -> list[nn.Module]:
    r"""Find the modules that ``fully_shard`` was called on.

    Args:
        model: The model.

    Returns:
        The FSDP2 modules, outermost first; empty when FSDP2 was never imported.

    Example:
        >>> fully_sharded(nn.Linear(2, 2))
        []
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return []
    return [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def reshard(model: nn.Module) -> None:
    r"""Put the shards of FSDP2 back into their modules, where a forward pass left whole weights there.

    Args:
        model: The model; nothing happens without FSDP2, and nothing is communicated.
    """
    for module in fully_sharded(model):
        module.reshard()  # type: ignore[operator]


def resting_layout(model: nn.Module, module: nn.Module, weight: Tensor) -> Layout | None:
    r"""How FSDP2 shards a weight at rest; call it at rest.

    Args:
        model: The model.
        module: The module in it that holds the weight.
        weight: The stored weight.

    Returns:
        Its mesh and placements; None where FSDP2 does not manage the weight.
    """
    if not is_sharded(weight):
        return None
    managed = any(module is inner for outer in fully_sharded(model) for inner in outer.modules())
    return Layout(weight.device_mesh, tuple(weight.placements)) if managed else None


class _Recipe(NamedTuple):
    """How backward gets a saved weight again."""

    view: "SmoothingView"
    weight: Tensor
    factors: "tuple[Factors, ...]"
    opening: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: Any


class ThinSaving:
    r"""Make autograd save a recipe in place of the smoothed weight; see Note [Thin saving].

    Args:
        view: The view whose gate has been opened.
        module: The module that reads its weight through the view in its forward.
    """

    def __init__(self, view: "SmoothingView", module: nn.Module) -> None:
        self._view = view
        self._contexts: list[Any] = []
        self._hooks = [
            module.register_forward_pre_hook(self._enter),
            module.register_forward_hook(self._leave, always_call=True),
        ]

    def remove(self) -> None:
        r"""Take the hooks out of the module; recipes that autograd holds stay good."""
        for hook in self._hooks:
            hook.remove()

    def mark(self, shown: Tensor, weight: Tensor) -> None:
        r"""Remember where a shown tensor comes from; the mark lives as long as the tensor.

        Args:
            shown: What the open view returns.
            weight: The stored weight that it was made from.
        """
        # With its view: attention reads its output projection's weight inside its own forward.
        shown._pss_source = self._view, weight  # type: ignore[attr-defined]

    def _enter(self, module: nn.Module, arguments: Any) -> None:
        context = None
        if torch.is_grad_enabled() and not _saving_is_taken():
            context = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
            context.__enter__()
        self._contexts.append(context)

    def _leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        context = self._contexts.pop() if self._contexts else None
        if context is not None:
            context.__exit__()

    def _pack(self, saved: Tensor) -> "Tensor | _Recipe":
        shown = saved if saved._base is None else saved._base
        view, weight = getattr(shown, "_pss_source", (self._view, None))
        if weight is None or view.factors is None or (is_sharded(saved) and saved is not shown and saved.dim() != 2):
            return saved
        return _Recipe(
            view,
            weight,
            view.factors,
            view.openings,
            saved.shape,
            saved.stride(),
            0 if is_sharded(saved) else saved.storage_offset(),
        )

    def _unpack(self, kept: "Tensor | _Recipe") -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            weight = kept.weight.detach()
            # After a fold FSDP2 gathers what the view showed.
            folded = kept.view.openings != kept.opening
            shown = weight if folded else kept.view.apply_factors(weight, kept.factors)
            if not is_sharded(shown):
                return shown.as_strided(kept.size, kept.stride, kept.offset)
            return shown if shown.shape == kept.size and shown.stride() == kept.stride else shown.mT


def _saving_is_taken() -> bool:
    # torch has no public name for the question whether someone's hooks for saved tensors are active.
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None
