# SPDX-License-Identifier: Apache-2.0
r"""Attaching: choose the weights, put views over them, and hand out the guard."""

import logging
from collections.abc import Callable

from torch import Tensor, nn

from pss_param.detector import AnyOf, Detector, GradientNormRatio
from pss_param.errors import ArgumentError, StateError
from pss_param.floor import StableRankFloor
from pss_param.guard import Guard, detach
from pss_param.policy import GuardPolicy
from pss_param.slot import Slot, occupied_slots
from pss_param.smoothing import LOWERING_SHAPES, Smoothing
from pss_param.targets import Target, TargetRules, select_companions, select_parameters
from pss_param.view import SmoothingView

__all__ = ["attach"]

_log = logging.getLogger("pss_param")

# Of the Frobenius norm. One step of Adam at a rate of 3e-3 moves a fresh weight by a tenth of its norm, and storing it
# in bfloat16 by 0.2 %; a tighter smoothing would be forgotten at once, and takes up to twice as long.
_LIVE_TOLERANCE = 1e-2


def attach(
    model: nn.Module,
    targets: str | TargetRules = "linear",
    smoothing: str | Smoothing | Callable[[Tensor, Tensor], Tensor] = "clip",
    edge: str | None = None,
    detector: Detector | None = None,
    policy: GuardPolicy | None = None,
) -> Guard:
    r"""Guard a model: put views over its weights and return the guard that opens them.

    The model stays what it is: parameters keep identity, order, names and bits, and its checkpoints are plain.

    Parametrize first and attach last: ``torch.nn.utils.parametrizations.weight_norm`` or ``orthogonal`` over a guarded
    weight raise a ``TypeError`` of torch, because they store something else than the weight. What they hold before is
    left alone. ``torch.save(model)`` of a whole parametrized model is refused by torch: save the ``state_dict``, or
    :meth:`Guard.detach` first.

    Args:
        model: The model, before or after its optimizer was made, before or after ``DistributedDataParallel``,
            ``fully_shard`` or ``parallelize_module``.
        targets: A preset such as ``"linear"`` (every matrix inside the blocks), or rules. In
            ``examples/benchmarks/results/stability.md``, "weights, of the default", other presets stand beside it.
        smoothing: A shape by name or as a callable, or a whole :class:`Smoothing`; others beside the default under
            "shape, of the default".
        edge: The level to which dominant values are brought. None for what ``smoothing`` says, else for ``"baseline"``
            (the norm that the weight had in health, at which whatever fires then holds all weights for some steps)
            where the detector remembers it, as the default one does, and the shape brings values down to a level; else
            for ``"dominant"``, the published one.
        detector: None for ``AnyOf(GradientNormRatio(), StableRankFloor())``: the published detector, which is blind
            where gradients only shrink, and one that sees weights collapse or grow. In
            the same file the default (``pss-default``) stands beside the published form (``pss-published``), the
            published edge (``pss-dominant``), runs without damping (``pss-undamped``) and, under "detector, of the
            default", beside one half of itself.
        policy: None for :class:`GuardPolicy` with its defaults.

    Returns:
        The guard.

    Raises:
        ArgumentError: If nothing is selected, or a selected weight cannot take a view.
        StateError: If the model is guarded already.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        >>> guard = attach(model, targets="all")
        >>> model(torch.ones(2, 8)).sum().backward()
        >>> event = guard.step()
        >>> event.triggered, event.skip
        (False, False)
        >>> guard.detach()
    """
    model = _unwrapped(model)
    if any(True for _ in occupied_slots(model)):
        raise StateError("the model is guarded already; call detach() on its guard or pss_param.detach(model)")
    detector = AnyOf(GradientNormRatio(), StableRankFloor()) if detector is None else detector
    chosen = _smoothing_of(smoothing, edge, detector)
    policy = GuardPolicy() if policy is None else policy
    rules = targets if isinstance(targets, TargetRules) else TargetRules(preset=targets)
    slots = _put_views(model, _find_slots(model, rules), chosen, policy.seed)
    companions = [_slot_named(model, name) for name in select_companions(model, slots)]
    return Guard(model, slots, detector, policy, companions)


def _put_views(
    model: nn.Module, found: list[tuple[Target, list[Slot]]], smoothing: Smoothing, seed: int
) -> dict[str, list[Slot]]:
    slots: dict[str, list[Slot]] = {}
    try:
        for target, holders in found:
            view = SmoothingView(
                _with_std(smoothing, target),
                matricization=target.matricization,
                label=target.name,
                seed=seed,
            )
            slots[target.name] = []
            for slot in holders:
                slot.put(view)
                slots[target.name].append(slot)
    except (ArgumentError, StateError):
        detach(model)
        raise
    return slots


def _find_slots(model: nn.Module, rules: TargetRules) -> list[tuple[Target, list[Slot]]]:
    selection = select_parameters(model, rules)
    for skipped in selection.skipped:
        _log.info("%s is not smoothed: %s", skipped.name, skipped.reason)
    found = []
    taken: set[int] = set()
    for target in selection.targets:
        slot = _slot_named(model, target.name)
        reason = _unfit(slot)
        if reason:
            _log.info("%s is not smoothed: %s", target.name, reason)
        elif id(slot.weight) not in taken:
            taken.add(id(slot.weight))
            found.append((target, _holders(model, slot.weight)))
    if not found:
        raise ArgumentError(
            f"preset {rules.preset!r} selects no weight of {type(model).__name__}; "
            "try targets='all' or TargetRules(include=(...,))"
        )
    return found


def _slot_named(model: nn.Module, name: str) -> Slot:
    path, _, leaf = name.rpartition(".")
    return Slot(model.get_submodule(path), leaf)


def _unfit(slot: Slot) -> str:
    if not slot.weight.requires_grad:
        return "it is frozen"
    return ""


def _holders(model: nn.Module, weight: Tensor) -> list[Slot]:
    return [
        Slot(module, name)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is weight
    ]


def _smoothing_of(smoothing: object, edge: str | None, detector: Detector) -> Smoothing:
    if isinstance(smoothing, Smoothing):
        if edge is not None:
            raise ArgumentError("edge is part of Smoothing; pass attach(smoothing=Smoothing(edge=...)) alone")
        chosen = smoothing
    else:
        lowers = callable(smoothing) or smoothing in LOWERING_SHAPES
        usual = "baseline" if detector.keeps_levels and lowers else "dominant"
        edge = usual if edge is None else edge
        chosen = Smoothing(shape=smoothing, edge=edge, tol=_LIVE_TOLERANCE)  # type: ignore[arg-type]
    if chosen.edge == "baseline" and not detector.keeps_levels:
        raise ArgumentError(
            f"edge='baseline' needs a detector that remembers healthy norms, got {type(detector).__name__}; use "
            "StableRankFloor() or AnyOf(..., StableRankFloor()), or another edge"
        )
    return chosen


def _with_std(smoothing: Smoothing, target: Target) -> Smoothing:
    if smoothing.init_std is not None or target.init_std is None:
        return smoothing
    return Smoothing(**{**vars(smoothing), "init_std": target.init_std})


def _unwrapped(model: nn.Module) -> nn.Module:
    # Names must not depend on the wrapper, or a guard's state would fit only the same wrapping.
    compiled = getattr(model, "_orig_mod", None)
    if isinstance(compiled, nn.Module):
        return _unwrapped(compiled)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return _unwrapped(model.module)
    return model
