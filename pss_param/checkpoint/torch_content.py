# SPDX-License-Identifier: Apache-2.0
r"""Where the weights are in what ``torch.save`` was given, and where all the other tensors are."""

from collections.abc import Iterator, Mapping
from typing import Any

from .pickled import Global, Made, Table
from .torch_tensors import Opaque, View, tensor_of

TensorPath = tuple[str | int, ...]
"""Keys and positions that lead to a tensor."""

CONTAINERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which trainers keep a model's state dict, the first that fits is taken."""

MAX_DEPTH = 100
"""Levels of nesting that are searched for tensors."""

_DICTIONARIES = frozenset({"collections.OrderedDict", "builtins.dict", "collections.defaultdict"})


def pairs_of(node: Any) -> list[tuple[Any, Any]] | None:
    r"""The items of a pickled dictionary.

    Args:
        node: anything that :func:`read_pickle` gives.

    Returns:
        Keys and values in order, or None where it is no dictionary.
    """
    if isinstance(node, Table):
        return node.pairs
    if not isinstance(node, Made) or node.path not in _DICTIONARIES:
        return None
    if node.pairs or not isinstance(node.args, tuple) or len(node.args) != 1 or not isinstance(node.args[0], list):
        return node.pairs
    # Protocols of old: OrderedDict([[key, value], ...]).
    return [(pair[0], pair[1]) for pair in node.args[0] if isinstance(pair, list | tuple) and len(pair) == 2]


def texts_of(node: Any) -> dict[str, Any]:
    r"""The items of a pickled dictionary that have text keys.

    Args:
        node: anything that :func:`read_pickle` gives.

    Returns:
        Values by key; empty where it is no dictionary.

    Raises:
        ValueError: a key appears twice.
    """
    found: dict[str, Any] = {}
    for key, value in pairs_of(node) or ():
        if isinstance(key, str):
            if key in found:
                raise ValueError(f"a dictionary in it has the key {key[:80]!r} twice")
            found[key] = value
    return found


def is_lightning(content: Any) -> bool:
    r"""Whether Lightning's trainer wrote this.

    Args:
        content: the pickled object.

    Returns:
        The answer.
    """
    return "pytorch-lightning_version" in texts_of(content)


def find_weights(content: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    r"""Find the state dict in a pickled object.

    Args:
        content: the pickled object.

    Returns:
        The keys that lead to the state dict, and its tensors by name.

    Raises:
        ValueError: there is none, or it cannot be told which.
    """
    if pairs_of(content) is None:
        raise ValueError(f"it holds {_kind(content)} instead of a state dict; save model.state_dict() with torch.save")
    top = texts_of(content)
    _refuse_foreign(top)
    prefix: tuple[str, ...] = ()
    for _ in range(MAX_DEPTH):
        key = next((key for key in CONTAINERS if _holds_tensors(top.get(key))), None)
        if key is None:
            break
        prefix, top = (*prefix, key), texts_of(top[key])
    weights = _tensors_in(top)
    if prefix or _is_state_dict(top, weights):
        return prefix, weights
    return _only_state_dict(top)


def _refuse_foreign(top: Mapping[str, Any]) -> None:
    if {"ds_version", "ds_config"} & set(top) or "zero_stage" in top:
        raise ValueError("it is one part of a DeepSpeed checkpoint; convert it with DeepSpeed's zero_to_fp32.py")
    if "checkpoint_version" in top and "args" in top:
        raise ValueError("it is one part of a Megatron checkpoint; convert it to the Hugging Face format first")


def _tensors_in(top: Mapping[str, Any]) -> dict[str, Any]:
    return {key: node for key, node in top.items() if tensor_of(node) is not None}


def _holds_tensors(node: Any) -> bool:
    if pairs_of(node) is None:
        return False
    inner = texts_of(node)
    return bool(_tensors_in(inner)) or any(
        key in inner and bool(_tensors_in(texts_of(inner[key]))) for key in CONTAINERS
    )


def _is_state_dict(top: Mapping[str, Any], weights: Mapping[str, Any]) -> bool:
    # A trainer's dictionary may hold a tensor of its own (a random state) beside its dictionaries.
    return bool(weights) and not any(_tensors_in(texts_of(node)) for node in top.values() if pairs_of(node))


def _only_state_dict(top: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    found = {key: tensors for key, node in top.items() if (tensors := _tensors_in(texts_of(node)))}
    if len(found) == 1:
        ((key, tensors),) = found.items()
        return (key,), tensors
    keys = ", ".join(repr(key[:40]) for key in list(found or top)[:8])
    what = "several dictionaries of tensors" if found else "no dictionary of tensors"
    raise ValueError(
        f"it holds {what} ({keys}) and none under {', '.join(CONTAINERS)}; save the model's state_dict on its own"
    )


def _kind(content: Any) -> str:
    if tensor_of(content) is not None:
        return "a single tensor"
    if isinstance(content, Made):
        return f"an object made by {content.path[:80] or 'a call'}"
    return f"the name {content.path[:80]}" if isinstance(content, Global) else f"a {type(content).__name__}"


def find_tensors(content: Any, known: Mapping[str, Any]) -> dict[TensorPath, View | Opaque]:
    r"""Find every tensor of a pickled object that is not among the known ones.

    Args:
        content: the pickled object.
        known: pickled tensors that are left out.

    Returns:
        The tensors by the keys and positions that lead to them, in the order of the file.

    Raises:
        ValueError: it is nested too deeply.
    """
    found: dict[TensorPath, View | Opaque] = {}
    seen = {id(node) for node in known.values()}
    waiting: list[tuple[TensorPath, Any]] = [((), content)]
    while waiting:
        path, node = waiting.pop()
        if len(path) > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
        tensor = tensor_of(node)
        if tensor is not None:
            if id(node) not in seen:
                found[path] = tensor
        elif id(node) not in seen:
            seen.add(id(node))
            waiting.extend((((*path, key), child)) for key, child in reversed(list(_children(node))))
    return found


def _children(node: Any) -> Iterator[tuple[str | int, Any]]:
    if isinstance(node, list | tuple):
        yield from _worthwhile(enumerate(node))
        return
    for at, (key, value) in enumerate(pairs_of(node) or ()):
        yield from _worthwhile([(key if isinstance(key, str | int) else f"<item {at}>", value)])
    if isinstance(node, Made) and node.path not in _DICTIONARIES:
        yield from _worthwhile((("<arguments>", node.args), ("<elements>", node.elements), ("<items>", node.pairs)))
    if isinstance(node, Made):
        yield from _worthwhile([("<state>", node.states)])


def _worthwhile(children: Any) -> Iterator[tuple[str | int, Any]]:
    return ((key, child) for key, child in children if isinstance(child, list | tuple | Table | Made) and child != ())
