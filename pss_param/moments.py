# SPDX-License-Identifier: Apache-2.0
r"""What a live optimizer remembers of a parameter, and how it forgets it."""

import torch
from torch import Tensor

__all__ = ["reset_moments"]


def reset_moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    r"""Bring what an optimizer remembers of one parameter back to its initial state.

    Optimizers create the state of a parameter anew when they find none. Only fused SGD wants the momentum of all
    parameters or of none: there it becomes zero, from which the next step makes it the gradient, as a first one does
    (times ``1 - dampening``).

    Args:
        optimizer: The optimizer.
        parameter: One of its parameters, or one that it does not have.
    """
    state = optimizer.state.get(parameter, {})
    momentum = state.get("momentum_buffer")
    if set(state) == {"momentum_buffer"} and momentum is not None and _is_fused(optimizer, parameter):
        momentum.zero_()
    else:
        optimizer.state.pop(parameter, None)


def _is_fused(optimizer: torch.optim.Optimizer, parameter: Tensor) -> bool:
    groups = [group for group in optimizer.param_groups if any(parameter is member for member in group["params"])]
    return any(group.get("fused") for group in groups)
