# SPDX-License-Identifier: Apache-2.0
r"""Norms and biases: what a fresh model has there, told by the name.

A run that diverges carries its vectors along: gains of norms grow, biases of gates saturate. They cannot be smoothed,
since a vector has no spectrum, and what they held is learned again within some tens of steps; so a deep repair puts
them back to where every common architecture starts, gains at 1 and biases at 0.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pss_param.roles import is_norm, plain_name

ZERO_CENTRED = re.compile(r"gemma|^qwen(3_next|3_5|4)|^nemotron|^minimax_m3|^step3p7|^muse_|^videoprism")
"""Model types of transformers some of whose norms multiply by one plus the stored gain; which ones, no name tells."""

_BIAS = re.compile(r"^(bias(_.*)?|.*_bias|b|beta)$")
_GAIN = re.compile(r"^(weight|scale|gain|gamma|g)$")


def initial_value(
    name: str,
    shape: tuple[int, ...],
    config: Mapping[str, Any] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> float | None:
    r"""Say what a fresh model has in a vector.

    Args:
        name: dotted name of the tensor.
        shape: its shape.
        config: the model's Hugging Face config, where there is one.
        shapes: of all tensors by name, where they are known: in a ``Sequential`` a norm has a number for a name, and
            is told by what lies beside its gain, a bias of the same length.

    Returns:
        1 for the gain of a norm, 0 for a bias; None for anything that is to be left alone, such as running statistics,
        a scale that no name explains, gains of a model that stores some of them less one, biases of Mamba's time
        steps.

    Example:
        >>> initial_value("layers.0.attn_norm.weight", (8,)), initial_value("layers.0.mlp.up_proj.bias", (8,))
        (1.0, 0.0)
        >>> initial_value("bn1.running_mean", (8,)) is None
        True
    """
    *modules, leaf = plain_name(name).split(".")
    if len(shape) != 1 or leaf == "dt_bias" or modules[-1:] == ["dt_proj"]:
        return None
    if _BIAS.match(leaf):
        return 0.0
    beside = name.removesuffix("weight") + "bias"
    plain = leaf == "weight" and shapes is not None and shapes.get(beside) == shape
    if plain or (_GAIN.match(leaf) and modules and is_norm(modules[-1].lower())):
        return None if any(ZERO_CENTRED.search(kind) for kind in _model_types(config or {})) else 1.0
    return None


def _model_types(config: Mapping[str, Any]) -> Iterator[str]:
    # A model of several modalities has the configs of its parts inside its own.
    kind = config.get("model_type")
    if isinstance(kind, str):
        yield kind
    for part in config.values():
        if isinstance(part, Mapping):
            yield from _model_types(part)
