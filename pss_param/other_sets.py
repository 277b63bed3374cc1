# SPDX-License-Identifier: Apache-2.0
r"""Further weights of the same model in one checkpoint, such as a moving average, which a repair leaves as they are."""

from collections.abc import Collection, Iterable, Iterator

from pss_param.checkpoint import Layout, StoredTensor
from pss_param.checkpoint.dcp import optimizer_part
from pss_param.optimizer_state import OptimizerState
from pss_param.roles import plain_name

SHARE = 0.5
"""A dictionary that has more than this share of the targets, in the same shapes, is one of the same model."""

_Key = tuple[str | int, ...]


def note_other_sets(layout: Layout, targets: Iterable[str], states: Iterable[OptimizerState]) -> Iterator[str]:
    r"""Name the dictionaries of a checkpoint that hold the repaired model once more.

    Args:
        layout: the checkpoint, entered.
        targets: names of the weights that are repaired.
        states: its optimizers, whose moments have the names of weights in some programs.

    Yields:
        str: one sentence for all of them, with the way out; nothing where there is none.
    """
    wanted = {_bare(name): layout.tensors[name] for name in targets}
    homes = {stored.storage for stored in wanted.values()}
    prefixes = {state.prefix for state in states}
    found = []
    for key, members in _dictionaries(layout).items():
        alike = [layout.state[m] for name, m in members.items() if _same_shape(wanted.get(name), layout.state[m])]
        # What shares the bytes of a weight is repaired with it.
        apart = not homes & {stored.storage for stored in alike}
        if len(alike) > SHARE * len(wanted) and apart and not _of_an_optimizer(key, prefixes):
            found.append("checkpoint" + "".join(f"[{_short(word)!r}]" for word in key))
    if found:
        yield (
            f"weights of the same model in {', '.join(found[:8])} are left as they are: put them through "
            f"pss_param.repair_state_dict({found[0]}) too, or begin them anew from the repaired ones"
        )


def _of_an_optimizer(key: _Key, prefixes: Collection[_Key]) -> bool:
    return optimizer_part((*key, "")) is not None or any(key[:length] in prefixes for length in range(len(key) + 1))


def _short(word: str | int) -> str | int:
    return f"{word[:80]}..." if isinstance(word, str) and len(word) > 80 else word  # keys out of a file have any length


def _dictionaries(layout: Layout) -> dict[_Key, dict[str, str]]:
    found: dict[_Key, dict[str, str]] = {}
    for key, path in layout.paths.items():
        if key in layout.state and path and isinstance(path[-1], str):
            found.setdefault(path[:-1], {})[_bare(path[-1])] = key
    return found


def _same_shape(one: StoredTensor | None, other: StoredTensor) -> bool:
    return one is not None and one.shape == other.shape


def _bare(name: str) -> str:
    name = plain_name(name)
    while name.startswith("model."):
        name = name.removeprefix("model.")
    return name
