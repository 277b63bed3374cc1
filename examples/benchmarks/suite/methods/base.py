# SPDX-License-Identifier: Apache-2.0
r"""What a method is: the hooks that the training loop calls, in the order in which it calls them.

`prepare` sees the model before the optimizer exists, `optimizer_options` sets up the optimizer, `start` begins the
run. Every step asks `lr_scale`, then `penalty`, runs the backward pass, asks `before_step` and, unless that says no,
lets the optimizer step; `after_step` ends it.

Methods that act on weight matrices (orthogonal regularisation, spectral normalisation, MSign) get the same matrices as
`pss_param.attach` with its default targets, so that no method wins or loses by the choice of layers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import pss_param as pss


class Method:
    """Nothing is done: the base of the methods, and the baseline.

    Attributes:
        events: how often the method intervened so far: triggers, skips, clips, holds.
        held: how often that was a guard that held weights at their levels after a trigger, which is no new trigger.
        model: the network, once the run has begun.
    """

    events: int = 0
    held: int = 0

    def fits(self, model: nn.Module) -> bool:
        """Whether the method has anything to act on; where it has not, a run would measure nothing.

        Args:
            model: the network as it is built.

        Returns:
            False for attention's own methods on a network without attention, for example.
        """
        return True

    def prepare(self, model: nn.Module) -> None:
        """Change the network before the optimizer exists.

        Args:
            model: the fresh network, changed in place.
        """

    def optimizer_options(self) -> dict[str, float]:
        """What is different about the optimizer.

        Returns:
            Keyword arguments for `suite.optimizers.make_optimizer`.
        """
        return {}

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int) -> None:
        """Begin a run.

        Args:
            model: the network.
            optimizer: its optimizer.
            total_steps: how long the run will be.
        """
        self.model = model

    def lr_scale(self, step: int) -> float:
        """Factor of the learning rate in a step.

        Args:
            step: number of the step, from 0.

        Returns:
            The factor.
        """
        return 1.0

    def penalty(self) -> Tensor | None:
        """What is added to the loss before the backward pass.

        Returns:
            A scalar, or None.
        """
        return None

    def before_step(self, step: int, loss: float) -> bool:
        """Look at the gradients, perhaps change them, and allow the optimizer's step or not.

        Args:
            step: number of the step, from 0.
            loss: training loss of this step, in nats, without the penalty.

        Returns:
            False to skip the update.
        """
        return True

    def after_step(self, step: int) -> None:
        """Change weights after the optimizer's step.

        Args:
            step: number of the step, from 0.
        """


@dataclass(frozen=True)
class BlockMatrix:
    """A weight that the default targets of `pss_param.attach` contain.

    Args:
        module: the module that holds it.
        leaf: the parameter's name in it, "weight" nearly always.
        matricization: how it is unpacked into matrices.
    """

    module: nn.Module
    leaf: str
    matricization: pss.Matricization

    @property
    def weight(self) -> Tensor:
        """The weight now.

        Returns:
            The parameter, or what a parametrization makes of it.
        """
        return getattr(self.module, self.leaf)

    def matrices(self) -> tuple[Tensor, ...]:
        """The matrices as which the weight acts.

        Returns:
            Tensors `(..., m, n)`, differentiable.
        """
        return self.matricization.split(self.weight)

    @torch.no_grad()
    def replace(self, matrices: tuple[Tensor, ...]) -> None:
        """Write matrices back into the stored weight.

        Args:
            matrices: as many and as large as those of `matrices`.
        """
        self.weight.copy_(self.matricization.join(matrices, self.weight))


def block_matrices(model: nn.Module) -> list[BlockMatrix]:
    """The matrices that every method of the suite acts on.

    Args:
        model: the network.

    Returns:
        One entry a weight, in the order of the parameters.
    """
    found = []
    for target in pss.select_parameters(model).targets:
        path, _, leaf = target.name.rpartition(".")
        found.append(BlockMatrix(model.get_submodule(path), leaf, target.matricization))
    return found


def gradient_norm(model: nn.Module) -> float:
    """Global 2-norm of the gradients.

    Args:
        model: the network after a backward pass.

    Returns:
        The norm.
    """
    return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def scale_gradients(model: nn.Module, factor: float) -> None:
    """Multiply all gradients.

    Args:
        model: the network after a backward pass.
        factor: the multiplier.
    """
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
