# SPDX-License-Identifier: Apache-2.0
r"""The words of choosing: the rules a user writes, and what comes out of them."""

import difflib
import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass

from pss_param.errors import ArgumentError
from pss_param.matricize import Matricization
from pss_param.roles import ATTENTION_ROLES, MLP_ROLES, plain_name

PRESETS: dict[str, frozenset[str]] = {
    "qk": frozenset({"q", "k", "q_a", "q_b", "qkv"}),
    "attention": ATTENTION_ROLES,
    "mlp": MLP_ROLES,
    "linear": frozenset(),
    "all": frozenset(),
    "none": frozenset(),
}
"""Presets by name, with the roles they choose; `linear`, `all` and `none` have rules of their own."""


@dataclass(frozen=True)
class TargetRules:
    """Which weights to choose.

    Args:
        preset: one of `PRESETS`.
        include: globs of weights to add to the preset, embeddings and heads too; a tensor of three axes as a batch of
            matrices.
        exclude: globs of weights to leave alone; wins over everything.
        per_head: q, k, v and o as a batch of one matrix per head; the module or the config must tell how
            many.
        tied: one Parameter under several names: `skip` it, or `share` one target among all its holders.

    Example:
        >>> TargetRules(preset="qk", exclude=("layers.0.*",)).preset
        'qk'
    """

    preset: str = "linear"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    per_head: bool = False
    tied: str = "skip"

    def __post_init__(self) -> None:
        """Refuse unknown words, and take any iterable of patterns.

        Raises:
            ArgumentError: an unknown preset or an unknown way with tied weights.
        """
        if self.preset not in PRESETS:
            close = difflib.get_close_matches(self.preset, PRESETS, n=1)
            raise ArgumentError(
                f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}"
                + "".join(f"; did you mean {c!r}?" for c in close)
            )
        if self.tied not in {"skip", "share"}:
            raise ArgumentError(f"tied must be 'skip' or 'share', got {self.tied!r}")
        for key in ("include", "exclude"):
            value = getattr(self, key)
            object.__setattr__(self, key, (value,) if isinstance(value, str) else tuple(value))


@dataclass(frozen=True)
class Target:
    """A weight to smooth.

    Args:
        name: its dotted name.
        role: q, k, v, qkv, kv, o, gate, up, gate_up, down, expert_* of the same, router, conv, recurrent, embedding,
            head, other.
        matricization: how it is unpacked into matrices.
        init_std: standard deviation that its initialiser draws with. None where it is unknown; the `init`
            edge then takes PyTorch's default for linear layers, `1 / sqrt(3 * fan_in)`.
        block: number of its block, None outside.
        aliases: other names of the same Parameter, when tied weights are shared.
    """

    name: str
    role: str
    matricization: Matricization
    init_std: float | None = None
    block: int | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A tensor that is left alone.

    Args:
        name: its dotted name.
        reason: why.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class Selection:
    """What the rules chose, and what they left, both in the order of the model.

    Args:
        targets: the weights to smooth.
        skipped: everything else, with reasons.
    """

    targets: tuple[Target, ...]
    skipped: tuple[Skipped, ...]


def matches(name: str, pattern: str) -> bool:
    """Tell whether a pattern covers a weight.

    Args:
        name: dotted name of the weight, wrappers and all.
        pattern: a glob on the name, or on that of a module that holds it, with or without wrappers and
            `model.`.

    Returns:
        True where it does.

    Example:
        >>> matches("module.model.layers.0.mlp.up_proj.weight", "layers.0.mlp")
        True
        >>> matches("layers.10.mlp.up_proj.weight", "layers.1.*")
        False
    """
    bare = plain_name(name)
    names = {name, bare}
    while bare.startswith("model."):
        bare = bare.removeprefix("model.")
        names.add(bare)
    patterns = {pattern, plain_name(pattern), plain_name(pattern).removeprefix("model.")}
    globs = [glob for one in patterns for glob in (one, f"{one}.*")]
    return any(fnmatch.fnmatchcase(one, glob) for one in names for glob in globs)


def refuse_unmatched(kind: str, pattern: str, names: Iterable[str]) -> None:
    """Raise for a pattern that covers nothing, naming what it may have meant.

    Args:
        kind: `include` or `exclude`.
        pattern: the pattern.
        names: all names.

    Raises:
        ArgumentError: always.
    """
    bare = pattern.replace("*", "")
    known = list(dict.fromkeys(names))
    near = [name for name in known if bare and bare.lower() in name.lower()][:3]
    near = near or difflib.get_close_matches(pattern, known, n=3, cutoff=0.4)
    meant = f"; near it are {', '.join(near)}" if near else f"; names look like {', '.join(known[:2])}"
    raise ArgumentError(f"{kind} pattern {pattern!r} matches no weight{meant}")
