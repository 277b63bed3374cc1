# SPDX-License-Identifier: Apache-2.0
"""Methods that hold the singular values of the block matrices: by a penalty, and by resetting them."""

import torch
from torch import Tensor, nn

from .base import Method, block_matrices


class OnBlocks(Method):
    """A method that acts on the block matrices."""

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int) -> None:
        """Find the matrices.

        Args:
            model: the network.
            optimizer: not used.
            total_steps: not used.
        """
        self.targets = block_matrices(model)


class SoftOrthogonality(OnBlocks):
    r"""Penalise block matrices that are not orthogonal.

    .. math:: \lambda \sum_W \lVert W^\top W - I \rVert_F^2

    on the smaller side of each matrix (:math:`W W^\top` where it has more columns than rows), where it can become 0.

    Args:
        strength: :math:`\lambda`, 1e-4 for the whole run. The source's code starts at 1e-2 and goes by factors of
            1e-3, 1e-4, 1e-6 to 0 at 20, 50, 70 and 120 of 200 epochs; our runs are short and have no such phases.

    References:
        "SO" of Bansal et al., "Can We Gain More from Orthogonality Regularizations in Training Deep CNNs?", arXiv
        1810.09102; the choice of the side as in github.com/VITA-Group/Orthogonality-in-CNNs.
    """

    def __init__(self, strength: float = 1e-4) -> None:
        self.strength = strength

    def penalty(self) -> Tensor | None:
        """The penalty.

        Returns:
            A scalar.
        """
        parts = [distance_to_orthogonal(matrix) for target in self.targets for matrix in target.matrices()]
        return self.strength * torch.stack(parts).sum()


def distance_to_orthogonal(matrix: Tensor) -> Tensor:
    r"""Squared Frobenius norm of what the Gram matrix of the smaller side lacks to the identity.

    Args:
        matrix: `(..., m, n)`.

    Returns:
        A scalar, summed over leading dimensions.
    """
    tall = matrix if matrix.shape[-2] >= matrix.shape[-1] else matrix.mT
    identity = torch.eye(tall.shape[-1], dtype=tall.dtype, device=tall.device)
    return (tall.mT @ tall - identity).square().sum()


class MSign(OnBlocks):
    r"""Every few steps, make all singular values of the block matrices equal.

    .. math:: W \leftarrow \frac{\lVert W \rVert_F}{\lVert U V^\top \rVert_F} U V^\top, \qquad W = U S V^\top

    after the optimizer's step; the Frobenius norm stays, the stable rank becomes the rank. A matrix that is not finite
    is left alone: it has no sign, and the run is over. `events` counts the resets.

    Args:
        period: steps between resets, `P`. The paper tries 10 to 100,000 on runs that fail after 2,000 to 50,000 steps
            and recommends 100; our runs of 300 steps collapse within tens, so the suite runs both 10 and 100.

    References:
        Ren et al., "MSign: An Optimizer Preventing Training Instability in Large Language Models via Stable Rank
        Restoration", arXiv 2602.01734, algorithm 1 and equation 14; on every block matrix, its best choice of layers.
        The paper's own runs clip the gradient to 1 and warm up besides.
    """

    def __init__(self, period: int = 10) -> None:
        self.period = period

    def after_step(self, step: int) -> None:
        """Reset if it is time.

        Args:
            step: number of the step, from 0.
        """
        if (step + 1) % self.period:
            return
        for target in self.targets:
            target.replace(tuple(matrix_sign(matrix) for matrix in target.matrices()))
        self.events += 1


@torch.no_grad()
def matrix_sign(matrix: Tensor) -> Tensor:
    r"""The matrix sign :math:`U V^\top`, at the Frobenius norm of the matrix.

    Args:
        matrix: `(..., m, n)`.

    Returns:
        The same shape, all singular values equal; the matrix itself where it is not finite.
    """
    if not bool(torch.isfinite(matrix).all()):
        return matrix
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    norm = torch.linalg.matrix_norm(matrix, keepdim=True)
    return U @ Vh * norm / min(matrix.shape[-2:]) ** 0.5
