# SPDX-License-Identifier: Apache-2.0
r"""Whether compiled programs may read a model's weights."""

import sys

from torch import nn

__all__ = ["anything_compiled"]


def anything_compiled(model: nn.Module) -> bool:
    r"""Tell whether the model, or anything else in this process, has been compiled by :func:`torch.compile`.

    A compiled training function leaves no trace in the model that it calls, only in the compiler's own counts, which
    have no public name. So this errs on the side of yes; a reset of these counts between the compilation and a trigger
    is the one case that it misses, and the view then says what to do.

    Args:
        model: The model whose weights are read.

    Returns:
        Whether directions have to exist before the next read.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> layer.compile()
        >>> anything_compiled(layer)
        True
    """
    if any(module._compiled_call_impl is not None for module in model.modules()):
        return True
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and dynamo.counters["stats"]["unique_graphs"] > 0
