# SPDX-License-Identifier: Apache-2.0
r"""Values that are not finite and yet no damage: masks, and what the user has excluded.

# Note [Infinities by design]
Causal masks are often buffers, ``register_buffer("mask", torch.triu(torch.full((T, T), float("-inf")), 1))``, and
observers of quantisation begin at infinite ends. A run that diverges leaves infinities too, so the rule errs on the
side of refusing. A tensor is left as it is where all of this holds:

- nothing is computed from it: it is no target, and no norm or bias that a repair puts back;
- its name is none of a parameter: no weight, bias, scale, token or running statistic, and no role in the model;
- it has no NaN, all its infinities have one sign, and all its finite values are equal.

What arithmetic has driven to infinity keeps other finite values beside them, or has both signs. NaN is damage anywhere.
``exclude`` overrides all of it: what is excluded is copied as it is.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from pss_param.counting import counted
from pss_param.plan import TensorSource
from pss_param.roles import Names, plain_name, role_of
from pss_param.selection import matches
from pss_param.targets import VAGUE_ROLES

BY_DESIGN = "holds infinities by design (a mask): left as it is"
"""Why such a tensor is skipped."""

_TRAINED = re.compile(r"weight|bias|scale|gain|gamma|alpha|beta|temperature|token|emb|running_(mean|var)")
_BOTH_SIGNS = frozenset({float("-inf"), float("inf")})


def why_left(source: TensorSource, names: Sequence[str], exclude: Iterable[str], count: int) -> str:
    r"""Say why the NaN and infinities of a tensor are no damage. See Note [Infinities by design].

    Args:
        source: where it is.
        names: all its names; none is a target.
        exclude: the user's patterns of names to leave alone.
        count: how many of its values are not finite.

    Returns:
        The reason; empty where they are damage.

    Example:
        >>> import torch
        >>> from pss_param.plan import StateDictSource
        >>> mask = torch.triu(torch.full((4, 4), float("-inf")), 1)
        >>> why_left(StateDictSource({"layers.0.mask": mask}), ["layers.0.mask"], (), 6)
        'holds infinities by design (a mask): left as it is'
    """
    pattern = next((pattern for pattern in exclude if any(matches(name, pattern) for name in names)), None)
    if pattern is not None:
        return f"excluded by {pattern!r}, and left as it is: {count} NaN or infinite value(s)"
    if any(_is_trained(name) for name in names) or not _is_mask(source.blocks(names[0])):
        return ""
    return BY_DESIGN


def _is_trained(name: str) -> bool:
    leaf = plain_name(name).rsplit(".", 1)[-1].lower()
    return bool(_TRAINED.search(leaf)) or role_of(name, Names()) not in VAGUE_ROLES


def _is_mask(blocks: Iterable[Tensor]) -> bool:
    values: set[float] = set()
    for block in blocks:
        values.update(block.double().unique().tolist())  # type: ignore[no-untyped-call]
        if len(values) > 2 or any(map(math.isnan, values)) or _BOTH_SIGNS <= values:
            return False
    return True


def notes_of(left: Mapping[str, str]) -> Iterator[str]:
    r"""Tell of the tensors that were left as they are.

    Args:
        left: answers of :func:`why_left` by name.

    Yields:
        str: a sentence for those that look like masks, one for those that were excluded.

    Example:
        >>> list(notes_of({"layers.0.mask": BY_DESIGN}))
        ['1 tensor holds infinities by design, as masks do, first layers.0.mask: that is no damage']
    """
    masks = [name for name, why in left.items() if why == BY_DESIGN]
    excluded = [name for name in left if name not in masks]
    if masks:
        those = counted(len(masks), "tensor holds", "tensors hold")
        yield f"{those} infinities by design, as masks do, first {masks[0]}: that is no damage"
    if excluded:
        those = counted(len(excluded), "excluded tensor holds", "excluded tensors hold")
        yield f"{those} NaN or infinity, first {excluded[0]}: left alone"
