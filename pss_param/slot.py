# SPDX-License-Identifier: Apache-2.0
r"""A slot: the place ``module.<name>`` where a Parameter lives and a view is put over it.

# Note [The Parameter stays in place]
Stock ``register_parametrization`` moves the Parameter to ``parametrizations.<name>.original``. That renames it,
reorders the parameters, drops the hooks of data parallelism, and breaks sharding, optimizer checkpoints and
weight tying. So the public function is called on a placeholder of the same shape; then the placeholder is
dropped, the list's ``original`` is made to read ``module._parameters[name]``, the Parameter goes back to its
place in the order, and the class gets a property that reads it directly. ``parametrize.is_parametrized`` holds
and ``module.parametrizations.<name>[0]`` is the view, while names, order, keys and identity are the plain
model's. The Parameter is looked up at every read and never kept: wrappers such as FSDP2 replace it.

# Note [Attached is invisible in checkpoints]
Saving and loading visit the children of a module after the module itself, and the list is such a child. While
the gate is open, saving puts the smoothed values over the raw ones that the module has just written; loading
closes the gate, because the new values owe nothing to the pending smoothing. No hooks are registered, so copies
of the module have nothing that points back to the original.

# Note [Attached is invisible to walkers]
``parallelize_module`` applies its recipe to every module that ``named_modules`` of a layer yields, and fails on the
containers of a parametrization; other tools count or pick layers there. So ``named_modules`` and ``modules`` of an
attached model yield what they yield of the plain one, and what others have put over the views, whose parameters an
optimizer must find. The views are still children: ``train``, ``to`` and checkpoints
go through these.

# Note [One class for all layers of a kind]
Stock parametrize gives every module a class of its own. A compiler that guards on types would then compile each of
a model's equal blocks anew, and give up at its limit after a few. So layers of one class whose views are over the
same names share a class. Other parametrizations may still come and go on a single layer: what is written into the
shared class later applies only to modules that have a parametrization of that name.
"""

import logging
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils import parametrize

from pss_param.compiled import note_traced
from pss_param.errors import ArgumentError, StateError
from pss_param.flat_weights import flat_weights
from pss_param.sharded import is_sharded
from pss_param.view import SmoothingView

__all__ = ["Slot", "occupied_slots"]

_log = logging.getLogger("pss_param")


class _InPlaceDict(nn.ModuleDict):
    """The parametrizations of a module; see Note [Attached is invisible to walkers]."""

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        if not all(isinstance(views, _InPlaceList) for views in self._modules.values()):
            yield from super().named_modules(memo, prefix, remove_duplicate)
            return
        for name, views in self._modules.items():
            if views is not None:
                yield from views.named_modules(memo, f"{prefix}.{name}", remove_duplicate)


class _InPlaceList(parametrize.ParametrizationList):
    """The parametrizations of a Parameter that stays with its owner; see the notes of this file."""

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        for place, other in list(self._modules.items())[1:]:  # the view is the first
            if other is not None:
                yield from other.named_modules(memo, f"{prefix}.{place}", remove_duplicate)

    @property
    def original(self) -> Tensor:  # type: ignore[override]
        owner: nn.Module = self.__dict__["_owner"]
        return owner._parameters[self.__dict__["_name"]]  # type: ignore[return-value]

    @property
    def view(self) -> SmoothingView:
        """The view, which is always the first parametrization."""
        first = self[0]
        if not isinstance(first, SmoothingView):
            raise StateError(f"the first parametrization of {self.__dict__['_name']} is no longer the view")
        return first

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name = self.__dict__["_name"]
        key = prefix.removesuffix(f"parametrizations.{name}.") + name
        if self.view.is_open and key in destination:
            with torch.no_grad():
                if is_sharded(self.original):
                    # The next forward pass has to show the bits that are saved here, and sees the weight whole.
                    self.view.prepare(self.original)
                destination[key] = self.view.smoothed(self.original).detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.view.is_open:
            _log.info("%s: a checkpoint was loaded, the pending smoothing is dropped", self.view.label)
            self.view.close()


@dataclass(frozen=True)
class Slot:
    r"""The place ``module.<name>``.

    Attributes:
        module: The module that holds the Parameter.
        name: The Parameter's name in that module.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> weight, slot = layer.weight, Slot(layer, "weight")
        >>> slot.put(SmoothingView())
        >>> parametrize.is_parametrized(layer, "weight"), layer.weight is weight
        (True, True)
        >>> slot.clear()
        >>> type(layer) is nn.Linear, layer.weight is weight
        (True, True)
    """

    module: nn.Module
    name: str

    @property
    def weight(self) -> Tensor:
        r"""The stored Parameter as it is now.

        Raises:
            StateError: If the module no longer has it.
        """
        weight = self.module._parameters.get(self.name)
        if weight is None:
            raise StateError(f"the module no longer holds a parameter {self.name!r}; detach before removing it")
        return weight

    @property
    def views(self) -> nn.Module | None:
        r"""The list that begins with the view, None where nothing is registered."""
        lists = self.module._modules.get("parametrizations")
        return None if lists is None else lists._modules.get(self.name)

    def put(self, view: SmoothingView) -> None:
        r"""Register the view over the Parameter, which stays where it is.

        Args:
            view: The view to register.

        Raises:
            ArgumentError: If another parametrization is registered there, or no Parameter lives there.
            StateError: If a view is registered there.
        """
        self._check_free()
        module, name = self.module, self.name
        if parametrize.is_parametrized(module):
            # Copies of the module share its parametrized class; what is added here must not appear in them.
            module.__class__ = _without_property(type(module), name)
        before = dict(module._parameters)
        module._parameters[name] = nn.Parameter(torch.empty_like(self.weight, device="meta"), requires_grad=False)
        parametrize.register_parametrization(module, name, view, unsafe=True)
        views = _list_at(module, name)
        views._parameters.clear()
        views.__dict__.update(_owner=module, _name=name)
        views.__class__ = _InPlaceList
        module.parametrizations.__class__ = _InPlaceDict
        module._parameters.clear()
        module._parameters.update(before)
        setattr(type(module), name, _reader(name))
        if isinstance(module, nn.RNNBase):
            type(module)._flat_weights = flat_weights  # type: ignore[assignment]
        module.__class__ = _shared_class(module)

    def clear(self) -> None:
        r"""Remove the view; the Parameter is not touched, and the class is what it was.

        Raises:
            StateError: If another parametrization was stacked on the view.
        """
        if len(_list_at(self.module, self.name)) > 1:
            raise StateError(
                f"another parametrization was registered over the view of {self.name!r}; remove that one first"
            )
        lists = self.module.parametrizations
        del lists._modules[self.name]  # type: ignore[union-attr]
        if len(lists._modules) == 0:  # type: ignore[union-attr]
            del self.module._modules["parametrizations"]
            self.module.__class__ = type(self.module).__bases__[0]
        else:
            # Copies of the module share its class, so the class is replaced and not edited.
            self.module.__class__ = _without_property(type(self.module), self.name)

    def _check_free(self) -> None:
        if self.name not in self.module._parameters and not parametrize.is_parametrized(self.module, self.name):
            raise ArgumentError(f"{type(self.module).__name__} has no parameter named {self.name!r}")
        if not parametrize.is_parametrized(self.module, self.name):
            return
        first = _list_at(self.module, self.name)[0]
        if isinstance(first, SmoothingView):
            raise StateError(f"{first.label} has a view already; call detach() on its guard first")
        raise ArgumentError(
            f"{self.name!r} of {type(self.module).__name__} is parametrized by {type(first).__name__}; "
            "remove that parametrization first or exclude the weight"
        )


def occupied_slots(model: nn.Module) -> Iterator[tuple[Slot, SmoothingView]]:
    r"""Find every view that lives in a model with its Parameter in place.

    Args:
        model: The model to search.

    Yields:
        The slot and its view, in the order of the modules.
    """
    for module in model.modules():
        for name, views in _lists(module):
            if isinstance(views, _InPlaceList):
                yield Slot(module, name), views.view


def _lists(module: nn.Module) -> list[tuple[str, nn.Module]]:
    lists = module._modules.get("parametrizations")
    return list(lists.named_children()) if isinstance(lists, nn.ModuleDict) else []


def _list_at(module: nn.Module, name: str) -> parametrize.ParametrizationList:
    found = dict(_lists(module)).get(name)
    if not isinstance(found, parametrize.ParametrizationList):
        raise StateError(f"{type(module).__name__}.{name} is not parametrized")
    return found


def _reader(name: str) -> property:
    # Written for speed: this runs at every read of every weight, and the closed gate is the normal state.
    def read(self: nn.Module) -> Tensor:
        views = self._modules["parametrizations"]._modules[name]  # type: ignore[union-attr]
        stack = views._modules  # type: ignore[union-attr]
        if stack["0"].is_read or len(stack) > 1:  # type: ignore[union-attr]
            return views()  # type: ignore[misc,no-any-return]
        if is_compiling():
            note_traced(stack["0"].tag)  # type: ignore[union-attr,arg-type]
        return self._parameters[name]  # type: ignore[return-value]

    return property(read)


class _Shared(type):
    """Class of the classes that several modules share; see Note [One class for all layers of a kind]."""

    def __setattr__(cls, name: str, value: object) -> None:
        super().__setattr__(name, _where_parametrized(name, value) if isinstance(value, property) else value)

    def __delattr__(cls, name: str) -> None:
        found = vars(cls).get(name)
        if isinstance(found, property):
            super().__setattr__(name, _where_parametrized(name, found))
        else:
            super().__delattr__(name)


_shared_classes: "weakref.WeakValueDictionary[tuple[type, tuple[str, ...]], type]" = weakref.WeakValueDictionary()


def _shared_class(module: nn.Module) -> type:
    own = type(module)
    names = tuple(sorted(name for name, views in _lists(module)))
    ours = all(isinstance(views, _InPlaceList) for _, views in _lists(module))
    if not ours or type(own.__bases__[0]) is not type:
        return own
    key = (own.__bases__[0], names)
    if key not in _shared_classes:
        kept = {name: value for name, value in vars(own).items() if name not in {"__dict__", "__weakref__"}}
        made = _Shared(own.__name__, own.__bases__, kept)
        _shared_classes[key] = made
        return made
    return _shared_classes[key]


def _where_parametrized(name: str, whole: property) -> property:
    def has(module: nn.Module) -> bool:
        return any(name == found for found, _ in _lists(module))

    def read(module: nn.Module) -> Any:
        return whole.__get__(module) if has(module) else nn.Module.__getattr__(module, name)

    def write(module: nn.Module, value: Any) -> None:
        if has(module):
            whole.__set__(module, value)
        elif isinstance(value, nn.Parameter):
            module._parameters[name] = value
        else:
            nn.Module.__setattr__(module, name, value)

    return property(read, write)


def _without_property(cls: type, name: str) -> type:
    kept = {key: value for key, value in vars(cls).items() if key not in {name, "__dict__", "__weakref__"}}
    return type(cls.__name__, cls.__bases__, kept)
