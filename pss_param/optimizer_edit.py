# SPDX-License-Identifier: Apache-2.0
r"""What a repair does to optimizer states: check, reset, and bring master copies of weights along.

# Note [Why a deep repair resets the moments]
Moments are averages of gradients with respect to weights that a deep repair has replaced: their squares come from the
steps at the deadly rate and hold the first steps of the resumed run back. Of 23 late deaths that were
resumed both ways after a deep repair, 21 ended ahead of a restart with a new optimizer and 18 with the old one:
``repair-deep`` and ``repair-keep`` in ``examples/benchmarks/results/stability.md``. A gentle repair leaves most of each
weight, and its moments, as they are.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pss_param.checkpoint import Layout
from pss_param.errors import CheckpointError, NonFiniteError
from pss_param.finite import SHOWN, count_nonfinite
from pss_param.optimizer_state import INITIAL, OptimizerState, Owner, find_optimizers, owners_by_name
from pss_param.param_order import ParamOrder, order_from_config, read_param_order
from pss_param.roles import plain_name

Put = Callable[[str, Tensor], None]


class OptimizerEditor:
    r"""The optimizer states of one open checkpoint.

    Args:
        layout: the checkpoint, entered.
        mode: ``"keep"``, ``"reset"`` or ``"reset-all"``.
        param_order: file of :func:`~pss_param.write_param_order`, or None.

    Names are mapped to states only where that is needed: for ``"reset"``, and where there are master copies. Then
    a :class:`CheckpointError` says what is missing.
    """

    def __init__(self, layout: Layout, mode: str, param_order: Any = None) -> None:
        r"""See the class."""
        self.layout, self.mode, self._given = layout, mode, param_order
        self.states = find_optimizers(layout)
        self.orders: dict[int, ParamOrder | None] = {}
        self._param_order = read_param_order(param_order) if param_order is not None else None
        self._owners: dict[int, dict[str, Owner]] = {}
        if mode != "keep" and not self.states:
            raise CheckpointError(
                f"{layout.path} holds no optimizer state that could be reset; leave --optimizer at keep, "
                "or name the folder that holds it"
            )
        for number, state in enumerate(self.states):
            self._refuse_loose(state)
            if mode == "reset" or state.masters():
                self._owners[number] = self._map(number, state)

    def anew(self) -> tuple["OptimizerEditor", str]:
        r"""Reset all moments where they can be: Note [Why a deep repair resets the moments].

        Returns:
            An editor that does, and nothing; or this one, and one clause of why moments are kept that should not be.
        """
        if not self.states:
            return self, ""
        editor = OptimizerEditor(self.layout, "reset-all", self._given)
        try:
            for state, owner, fields in editor.chosen(()):
                editor._refuse_unknown(state, owner, fields)
        except CheckpointError as error:
            return self, f"the optimizer keeps its moments, though a new one would do better: {error}"
        return editor, ""

    def _refuse_loose(self, state: OptimizerState) -> None:
        if loose := state.loose_masters():
            raise CheckpointError(
                f"{self.layout.path}: {state.label} keeps master copies of weights flattened together ({loose[0]}); "
                "they would overwrite repaired weights at the next step; start a new optimizer from the repaired "
                "weights: repair the weights' file alone"
            )

    def _map(self, number: int, state: OptimizerState) -> dict[str, Owner]:
        if len(getattr(self.layout, "sets", ())) > 1:
            raise CheckpointError(
                f"{self.layout.path} holds several models, and whose parameters {state.label} numbers is not recorded; "
                f"{_without_names(state)}"
            )
        order = self._order(state) if state.numbered or state.groups else None
        self.orders[number] = order
        return owners_by_name(state, self.layout, order)

    def _order(self, state: OptimizerState) -> ParamOrder:
        if self._param_order is not None:
            return self._param_order
        if state.names:
            names = tuple(plain_name(name) for name in state.names)
            return ParamOrder(names, ((),) * len(names), "its own records", checked=False)
        if self.layout.format == "lightning" and len(state.groups) == 1:
            return self._stored_order(state)
        if (self.layout.path / "config.json").is_file():
            return order_from_config(self.layout.path, [len(group) for group in state.groups])
        raise CheckpointError(
            f"{self.layout.path}: {state.label} numbers its parameters and nothing here says which is which; pass "
            "--param-order FILE, made once by pss_param.write_param_order(model, optimizer, FILE), or "
            f"{_without_names(state)}"
        )

    def _stored_order(self, state: OptimizerState) -> ParamOrder:
        # One group: Lightning modules pass self.parameters(), which has the order of the state dict without buffers.
        first: dict[Any, str] = {}
        for name, stored in self.layout.tensors.items():
            leaf = name.rsplit(".", 1)[-1]
            if stored.floating and leaf not in {"running_mean", "running_var"}:
                first.setdefault(stored.storage, name)
        names = tuple(first.values())
        return ParamOrder(
            names, tuple(self.layout.tensors[name].shape for name in names), "the order of its state_dict"
        )

    @property
    def changing(self) -> Iterator[str]:
        r"""Keys of the tensors that may be written, or read for that: masters, and under a reset all moments."""
        for state in self.states:
            for keys in state.masters().values():
                yield from keys
            if self.mode != "keep":
                yield from state.tensors()

    def nonfinite(self, counted: Mapping[str, int] | None = None) -> dict[str, int]:
        r"""Count NaN and infinity in all moments.

        Args:
            counted: what is known already, by key.

        Returns:
            Counts by key; tensors without any are left out.
        """
        known, counts = counted or {}, {}
        for key in (key for state in self.states for key in state.tensors()):
            if not self.layout.state[key].floating:
                continue
            count = known[key] if key in known else count_nonfinite(self.layout.blocks(key))
            if count:
                counts[key] = count
        return counts

    def masters_of(self, names: Iterable[str]) -> tuple[str, ...]:
        r"""Master copies of a weight.

        Args:
            names: all names of the weight in the checkpoint.

        Returns:
            Their keys.
        """
        found: list[str] = []
        for number, state in enumerate(self.states):
            copies = state.masters()
            found += [key for owner in self._owned(number, names) for key in copies.get(owner, ())]
        return tuple(found)

    def _owned(self, number: int, names: Iterable[str]) -> list[Owner]:
        owners = self._owners.get(number, {})
        return list(dict.fromkeys(owners[name] for name in map(plain_name, names) if name in owners))

    @property
    def origin(self) -> str:
        r"""Where the order of numbered parameters was taken from; empty where none was needed."""
        return ", ".join(dict.fromkeys(order.origin for order in self.orders.values() if order is not None))

    def check(self, repaired: Sequence[Sequence[str]], counted: Mapping[str, int] | None = None) -> None:
        r"""Make sure that everything that is to be done can be, before anything is written.

        Args:
            repaired: names, with aliases, of the tensors that may change.
            counted: NaN and infinite elements by key, of the moments that somebody has counted already.

        Raises:
            CheckpointError: a field's initial state is unknown.
            NonFiniteError: moments that would stay hold NaN or infinity.
        """
        gone = {key for _, _, fields in self.chosen(repaired) for key in fields.values()}
        bad = {key: count for key, count in self.nonfinite(counted).items() if key not in gone}
        if bad:
            names = ", ".join(f"{key} ({count})" for key, count in list(bad.items())[:SHOWN])
            more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
            way = "reset-all" if self.mode == "reset" else "reset-all (or reset, where the parameters' names are known)"
            raise NonFiniteError(
                f"{self.layout.path} holds NaN or infinity in {len(bad)} moment(s) of its optimizer: {names}{more}; "
                f"pass --optimizer {way} to set moments back to their initial state"
            )
        for state, owner, fields in self.chosen(repaired):
            self._refuse_unknown(state, owner, fields)
        self._refuse_unmapped(repaired)

    def _refuse_unmapped(self, repaired: Sequence[Sequence[str]]) -> None:
        if self.mode != "reset":
            return
        for names in repaired:
            if not any(self._owned(number, names) for number in range(len(self.states))):
                raise CheckpointError(
                    f"{self.layout.path}: no optimizer state names {names[0]} (the order came from "
                    f"{self.origin or 'its own records'}); --exclude it, or use --optimizer reset-all"
                )

    def _refuse_unknown(self, state: OptimizerState, owner: Owner, fields: Mapping[str, str]) -> None:
        masters = state.masters().get(owner, ())
        for name, key in fields.items():
            stored = self.layout.state[key]
            if key not in masters and (name not in INITIAL or not stored.floating):
                raise CheckpointError(
                    f"{self.layout.path}: the initial state of {name} ({stored.dtype_name}) in {state.label} is not "
                    "known, so it cannot be reset; leave --optimizer at keep, and reset it in the training program"
                )
        if plain := state.numbers.get(owner):
            raise CheckpointError(
                f"{self.layout.path}: {plain[0]} of parameter {owner} in {state.label} is a number inside a pickle, "
                "not a tensor, and cannot be reset in place; load and save the optimizer with a newer torch first"
            )

    def chosen(self, repaired: Iterable[Sequence[str]]) -> list[tuple[OptimizerState, Owner, Mapping[str, str]]]:
        r"""Which parameters' states are reset.

        Args:
            repaired: names, with aliases, of the tensors that are repaired.

        Returns:
            State, parameter, and keys by field.
        """
        if self.mode == "keep":
            return []
        names = [name for aliases in repaired for name in aliases]
        rows: list[tuple[OptimizerState, Owner, Mapping[str, str]]] = []
        for number, state in enumerate(self.states):
            owners = list(state.fields) if self.mode == "reset-all" else self._owned(number, names)
            rows += [(state, owner, state.fields[owner]) for owner in owners if owner in state.fields]
        return rows

    def reset(self, repaired: Iterable[Sequence[str]], put: Put) -> tuple[str, ...]:
        r"""Write initial states.

        Args:
            repaired: names, with aliases, of the tensors that were repaired.
            put: takes every new tensor.

        Returns:
            The parameters, by name or number.
        """
        labels = []
        for state, owner, fields in self.chosen(repaired):
            masters = state.masters().get(owner, ())
            for name, key in fields.items():
                if key not in masters:
                    stored = self.layout.state[key]
                    put(key, torch.full(stored.shape, INITIAL[name], dtype=stored.dtype))
            labels.append(self._label(state, owner))
        return tuple(labels)

    def _label(self, state: OptimizerState, owner: Owner) -> str:
        owners = self._owners.get(self.states.index(state), {})
        return next((name for name, other in owners.items() if other == owner), str(owner))


def _without_names(state: OptimizerState) -> str:
    # No reset helps where there are master copies: each must be the repaired weight, so its name has to be known.
    if not (masters := state.masters()):
        return "use --optimizer reset-all, or repair a file that holds the weights alone"
    first = next(iter(masters.values()))[0]
    return (
        "repair a file that holds the weights alone and start a new optimizer (no reset helps: "
        f"{first} is the optimizer's own copy of a weight and would overwrite the repaired one)"
    )
