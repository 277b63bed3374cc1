# SPDX-License-Identifier: Apache-2.0
r"""Damping: a weight that has to be smoothed learns more slowly, until it no longer has to.

# Note [Why smoothing alone is not enough]
Smoothing takes away what the last updates did, and the next update, as large as the last, does it again. A weight that
is divided by its spectral norm (spectral normalisation, sigma-reparametrisation) does not suffer from that: what is
stored grows, so the same update turns it less and less. Damping gives a smoothed weight this brake, and nothing to one
that was never smoothed.

# Note [Companions]
Biases and the gains of norms have no spectrum to smooth, and at a deadly rate they end a run by themselves: with every
matrix held at its healthy norm, a deep perceptron lost 1.3 nats at 32 times its rate where they did not follow
(``default-companions-left`` in ``examples/benchmarks/results/stability.md``). So they follow: the geometric mean of the
weights' factors is theirs, or what spikes of the gradient have made of their own, if that is more: a spike may come
from them alone. Embeddings and the output head do not follow; they have to move far in health.

# Note [After the optimizer's step]
What an optimizer does is only known when it has done it, so a damped weight is copied just before the step and drawn
back towards the copy just after. For optimizers whose update is proportional to the learning rate this is that
weight's learning rate divided by the factor, decoupled weight decay included. Post-hooks of the optimizer itself run
before that and see the whole update.

# Note [Hooks on all optimizers]
Torch offers hooks for every optimizer, so a loop need not name its own. There is one pair for all guards, from the
first damped weight on until nobody damps any more; a guard that is dropped leaves them idle, because a garbage
collection must not unhook in the middle of a step. An optimizer may step inside another one's (wrappers do): the
inner one's copies replace the outer one's, so that nothing is damped twice.

# Note [A compiled optimizer]
The hooks are no part of its graph: traced, they would be compiled anew at every step, since the factors are Python
numbers that change at every step. So its step runs eagerly while something is damped, and as it was compiled otherwise.
"""

import copy
import logging
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from pss_param.compiled import eagerly
from pss_param.sharded import is_sharded

__all__ = ["Damping"]

_log = logging.getLogger("pss_param")


class Damping:
    r"""Divide what optimizers do to weights that were smoothed.

    .. math::
        W \leftarrow W_t + (W - W_t) / \rho, \qquad
        \rho \leftarrow \begin{cases} \min(64, f \cdot \max(1, 0.99\,\rho)) & \text{struck by } f \\
        \max(1, 0.99\,\rho) & \text{else} \end{cases}

    with :math:`W_t` before and :math:`W` after the optimizer's step; :math:`\rho` starts at 1 for each weight.

    Args:
        weight_of: Finds the stored weight of a name; None where there is none any more.
        companions: Finds the parameters that follow: Note [Companions].
        among: The number of weights whose mean they follow, those that are not damped included.
        on: Whether anything is ever damped.

    Attributes:
        rho: The factors above 1, by name.
        following: What spikes have made of the companions' factor.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> damping = Damping({"w": weight}.get)
        >>> damping.strike({"w": 2.0})
        >>> weight.grad = torch.ones(2)
        >>> optimizer.step()
        >>> weight.tolist()
        [-0.5, -0.5]

    References:
        Ours; Miyato et al., arXiv 1802.05957, section 2 for the effect in spectral normalisation.
    """

    forgetting = 0.99
    """Of each factor, per step: it halves in 69."""
    most = 64.0
    """The largest factor."""
    patience = 20
    """Steps in a row in which no optimizer was seen before that is said."""

    def __init__(
        self,
        weight_of: Callable[[str], Tensor | None],
        companions: Callable[[], Iterable[Tensor]] = tuple,
        among: int = 1,
        on: bool = True,
    ) -> None:
        self.rho: dict[str, float] = {}
        self.following = 1.0
        self._weight_of, self._companions, self._among, self._on = weight_of, companions, among, on
        self._copies: list[tuple[list[Tensor], list[Tensor], float]] = []
        self._stepping: weakref.ref[torch.optim.Optimizer] | None = None
        self._unseen = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "Damping":
        twin = Damping(*copy.deepcopy((self._weight_of, self._companions, self._among, self._on), memo))
        twin.load(self.rho, self.following)
        return twin

    def forget(self) -> None:
        r"""Bring every factor closer to 1, at the beginning of a step of the guard."""
        self._notice_missing()
        self.load({name: self.forgetting * rho for name, rho in self.rho.items()}, self.forgetting * self.following)
        self._copy_again()

    @property
    def active(self) -> bool:
        r"""Whether anything is damped."""
        return bool(self.rho) or self.following > 1

    @property
    def companions(self) -> float:
        r"""The companions' factor: the weights' geometric mean, 1 for those not damped, or what spikes made of it."""
        return max(self.following, math.exp(sum(map(math.log, self.rho.values())) / self._among))

    def strike(
        self, factors: Mapping[str, float], optimizer: torch.optim.Optimizer | None = None, following: float = 1.0
    ) -> None:
        r"""Damp weights and their companions more.

        Args:
            factors: What each weight's :math:`\rho` is multiplied by.
            optimizer: Whose step may be under way, if it is known: the hooks have not seen it begin if these are the
                first weights to be damped.
            following: What the companions' own factor is multiplied by.
        """
        if not self._on or not (factors or following > 1):
            return
        if not self.active and optimizer is not None:
            self._stepping = weakref.ref(optimizer)
        struck = {name: factor * self.rho.get(name, 1.0) for name, factor in factors.items()}
        self.load({**self.rho, **struck}, following * self.following)
        self._copy_again()

    def load(self, rho: Mapping[str, float], following: float = 1.0) -> None:
        r"""Set all factors.

        Args:
            rho: By name; those that are not above 1 damp nothing, and none does where the policy damps nothing.
            following: The companions' own.
        """
        self.rho = {name: min(self.most, value) for name, value in rho.items() if value > 1 and self._on}
        self.following = max(1.0, min(self.most, following)) if self._on else 1.0
        self._copies.clear()
        if self.active:
            _HOOKS.add(self)
        else:
            _HOOKS.discard(self)

    def stop(self) -> None:
        r"""Damp nothing from now on."""
        self.load({})
        self._stepping, self._unseen = None, 0

    def _copy_again(self) -> None:
        # A guard that steps inside the optimizer's step, from a hook or a closure, may have folded: copies are stale.
        inside = self._stepping() if self._stepping is not None else None
        if inside is not None and self.active:
            self.before(inside)

    @torch.no_grad()
    def before(self, optimizer: torch.optim.Optimizer) -> None:
        r"""Copy the damped weights that an optimizer is about to move.

        Args:
            optimizer: The optimizer.
        """
        self._stepping = weakref.ref(optimizer)
        self._copies.clear()
        moved = {
            id(weight) for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None
        }
        found = [(weight, rho) for weight, rho in self._damped() if id(weight) in moved]
        self._copies = _copied(found)
        if found:
            self._unseen = 0

    def _damped(self) -> Iterable[tuple[Tensor, float]]:
        # By identity: a companion may be tied to another one, or to a weight.
        factor = self.companions
        damped = {id(companion): (companion, factor) for companion in self._companions()}
        weights = ((self._weight_of(name), rho) for name, rho in self.rho.items())
        return {**damped, **{id(weight): (weight, rho) for weight, rho in weights if weight is not None}}.values()

    @torch.no_grad()
    def after(self) -> None:
        r"""Draw back what was copied."""
        for weights, copies, share in self._copies:
            if len(weights) == 1:
                weights[0].lerp_(copies[0], share)
            else:
                torch._foreach_lerp_(weights, copies, share)
        self._copies.clear()
        self._stepping = None

    def _notice_missing(self) -> None:
        self._unseen += bool(self.rho)
        if self._unseen == self.patience + 1:
            _log.warning(
                "%d weights are to be damped, and in %d steps no torch.optim.Optimizer has moved them, so nothing is "
                "damped; an optimizer of another kind needs a lower learning rate, or GuardPolicy(damping=1)",
                len(self.rho),
                self.patience,
            )


class _Hooks:
    """The one pair of hooks; see Note [Hooks on all optimizers] and Note [A compiled optimizer]."""

    def __init__(self) -> None:
        self._damping: weakref.WeakSet[Damping] = weakref.WeakSet()
        self._handles: tuple[RemovableHandle, ...] = ()

    def add(self, damping: Damping) -> None:
        self._damping.add(damping)
        if not self._handles:
            before = register_optimizer_step_pre_hook(eagerly(self._before))
            self._handles = (before, register_optimizer_step_post_hook(eagerly(self._after)))

    def discard(self, damping: Damping) -> None:
        self._damping.discard(damping)
        if not self._damping:
            for handle in self._handles:
                handle.remove()
            self._handles = ()

    def _before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for damping in list(self._damping):
            damping.before(optimizer)

    def _after(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for damping in list(self._damping):
            damping.after()


_HOOKS = _Hooks()


def _copied(damped: Iterable[tuple[Tensor, float]]) -> list[tuple[list[Tensor], list[Tensor], float]]:
    """Weights, their copies, and the share to be taken back: a GPU copies hundreds of plain ones in some kernels."""
    groups: dict[tuple[float, int], list[Tensor]] = {}
    for weight, rho in damped:
        local = _local(weight)
        # A subclass is alone: its own dispatch would run a call of many once for each of its parts.
        plain = type(local) in {Tensor, nn.Parameter}
        groups.setdefault((1 - 1 / rho, 0 if plain else id(local)), []).append(local)
    return [(weights, _copies_of(weights), share) for (share, _), weights in groups.items()]


def _copies_of(weights: list[Tensor]) -> list[Tensor]:
    if len(weights) == 1:
        return [weights[0].clone()]
    copies = [torch.empty_like(weight) for weight in weights]
    torch._foreach_copy_(copies, weights)
    return copies


def _local(weight: Tensor) -> Tensor:
    # An optimizer moves each entry where it lies, and so does damping.
    return weight.to_local() if is_sharded(weight) else weight
