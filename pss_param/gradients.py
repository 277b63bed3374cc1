# SPDX-License-Identifier: Apache-2.0
r"""Gradients of a model as a guard needs them: their norm, scaling them, dropping them.

# Note [Whose gradients]
A guard may hold a part of what an optimizer moves: a model without its head, one of two networks. It measures and
clips the gradients of its own part, but a step that is not to happen must not happen to the others either. So where the
optimizer is known, the gradients of all its parameters are dropped or cleared.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pss_param.errors import StateError
from pss_param.policy import GuardPolicy
from pss_param.sharded import is_sharded, whole_norm

__all__ = ["clear_nonfinite", "drop_gradients", "gradient_norm", "scale_gradients", "treat_gradient"]


def gradient_norm(model: nn.Module) -> Tensor:
    r"""Global 2-norm of all gradients, as :func:`torch.nn.utils.clip_grad_norm_` reports it.

    Args:
        model: The model whose parameters hold gradients.

    Returns:
        A scalar on the gradients' device. Sparse gradients count as the dense ones that they stand for.

    Raises:
        StateError: If no parameter has a gradient.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> layer(torch.tensor([3.0, 4.0])).backward()
        >>> float(gradient_norm(layer))
        5.0
    """
    grads = [_dense(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    if not grads:
        raise StateError(
            "no parameter has a gradient; call guard.step() after backward() and before zero_grad(), "
            "or pass guard.step(grad_norm=...)"
        )
    # Norms of gradients on different meshes, or on none, cannot be taken together.
    groups: dict[object, list[Tensor]] = {}
    for grad in grads:
        groups.setdefault(_mesh_of(grad), []).append(grad)
    norms = [whole_norm(torch.nn.utils.get_total_norm(group)) for group in groups.values()]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def _mesh_of(grad: Tensor) -> object:
    return grad.device_mesh if is_sharded(grad) else None


def _dense(grad: Tensor) -> Tensor:
    # Of nn.Embedding(sparse=True): an index may come several times, and only the sum of its values is a gradient.
    return grad.coalesce().values() if grad.is_sparse else grad


@torch.no_grad()
def scale_gradients(model: nn.Module, factor: float) -> None:
    r"""Multiply all gradients in place.

    Args:
        model: The model whose parameters hold gradients.
        factor: The multiplier.
    """
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


@torch.no_grad()
def clear_nonfinite(model: nn.Module, norm: float | Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
    r"""Set all gradients to zero if their norm is not finite, decided on the device; the host learns nothing.

    Args:
        model: The model whose parameters hold gradients.
        norm: Their global norm.
        optimizer: Whose other gradients are cleared too: Note [Whose gradients].

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> layer.weight.grad = torch.tensor([[1.0, float("nan")]])
        >>> clear_nonfinite(layer, gradient_norm(layer))
        >>> layer.weight.grad.tolist()
        [[0.0, 0.0]]
    """
    bad = torch.isfinite(torch.as_tensor(norm)).logical_not()
    for parameter in _moved(model, optimizer):
        if parameter.grad is not None:
            local = _stored(parameter.grad)
            local.masked_fill_(bad.to(local.device, non_blocking=True), 0)


def _stored(grad: Tensor) -> Tensor:
    if grad.is_sparse:
        return grad._values()
    return grad.to_local() if is_sharded(grad) else grad


def drop_gradients(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    r"""Set all gradients to None, so that an optimizer's step changes neither weights nor moments.

    Args:
        model: The model whose parameters hold gradients.
        optimizer: Whose other gradients are dropped too: Note [Whose gradients].

    Example:
        >>> body, head = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> head(body(torch.ones(1))).backward()
        >>> drop_gradients(body, torch.optim.SGD([*body.parameters(), *head.parameters()], lr=1.0))
        >>> head.weight.grad is None
        True
    """
    for parameter in _moved(model, optimizer):
        parameter.grad = None


def _moved(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[Tensor]:
    yield from model.parameters()
    for group in optimizer.param_groups if optimizer is not None else ():
        yield from group["params"]


def treat_gradient(
    model: nn.Module, policy: GuardPolicy, norm: float, limit: float, optimizer: torch.optim.Optimizer | None = None
) -> bool:
    r"""Do to a gradient that has triggered what the policy says.

    Args:
        model: The model whose parameters hold the gradient.
        policy: Says what.
        norm: Its global norm as it was judged.
        limit: The norm that would just have triggered.
        optimizer: Whose other gradients are dropped with it: Note [Whose gradients].

    Returns:
        Whether the gradient was dropped.
    """
    if policy.on_trigger == "smooth_and_skip":
        drop_gradients(model, optimizer)
        return True
    if policy.on_trigger == "smooth_and_clip" and norm > limit:
        # What was judged may be from before a clipping of the user's own: clip what is there now.
        present = float(gradient_norm(model))
        if present > limit:
            scale_gradients(model, limit / present)
    return False
