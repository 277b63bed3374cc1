# SPDX-License-Identifier: Apache-2.0
r"""Which tensor of one checkpoint is which of another, where trainers have put different words before the names.

Three rules, the first that pairs a name counts; the third is asked only where the others pair none at all:

1. the names are equal;
2. they are equal without the wrappers of :func:`pss_param.roles.plain_name` (``module.``, ``_orig_mod.``, ...);
3. one dotted prefix before all names of one side makes them names of the other (Lightning's ``model.``, ``net.``,
   ``transformer.`` of a bare Hugging Face model inside a whole one). Two prefixes that do are two models in one file,
   and nothing is guessed.
"""

from collections.abc import Collection

from pss_param.errors import ArgumentError
from pss_param.roles import plain_name


def pair_names(names: Collection[str], others: Collection[str]) -> dict[str, str]:
    r"""Find each tensor's counterpart by name.

    Args:
        names: keys of a checkpoint.
        others: keys of another one of the same model.

    Returns:
        The other's key by this one's, in this one's order; names without a counterpart are absent.

    Raises:
        ArgumentError: the two have nothing in common, or several prefixes fit; it reads on from their names.

    Example:
        >>> pair_names(["head.weight", "module.h.0.weight"], ["h.0.weight", "head.weight"])
        {'head.weight': 'head.weight', 'module.h.0.weight': 'h.0.weight'}
        >>> pair_names(["fc.bias", "fc.weight"], ["model.fc.weight", "model.fc.bias"])
        {'fc.bias': 'model.fc.bias', 'fc.weight': 'model.fc.weight'}
    """
    ours = {name: plain_name(name) for name in names}
    known = set(others)
    plain = {plain_name(name): name for name in others}
    pairs = {name: name if name in known else plain.get(bare) for name, bare in ours.items()}
    if not any(pairs.values()):
        renamed = _bridge(ours.values(), plain)
        pairs = {name: plain.get(renamed.get(bare, "")) for name, bare in ours.items()}
    found = {name: other for name, other in pairs.items() if other is not None}
    if ours and plain and not found:
        raise ArgumentError(
            f"have no tensor in common: the first has {next(iter(ours))}, the second {next(iter(others))}; "
            "name two checkpoints of the same model"
        )
    return found


def _bridge(ours: Collection[str], theirs: Collection[str]) -> dict[str, str]:
    found = {prefix: {prefix + name: name for name in theirs} for prefix in _prefixes(theirs, ours)}
    found |= {prefix: {name: prefix + name for name in ours} for prefix in _prefixes(ours, theirs)}
    if len(found) > 1:
        first, second = sorted(found)[:2]
        raise ArgumentError(
            f"have names that fit under {first!r} and under {second!r}, and which is meant is unknown; save the "
            "tensors of one of them on their own"
        )
    return next(iter(found.values()), {})


def _prefixes(short: Collection[str], long: Collection[str]) -> list[str]:
    first, every = next(iter(short), ""), set(long)
    candidates = [name.removesuffix(first) for name in every if first and name.endswith(f".{first}")]
    return [prefix for prefix in candidates if all(prefix + name in every for name in short)]
