# SPDX-License-Identifier: Apache-2.0
"""Methods that write a weight as something divided by its spectral norm."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from .base import Method, block_matrices


class SpectralNormalisation(Method):
    r"""Divide every block matrix by its spectral norm: all layers have norm 1 and no scale of their own.

    .. math:: \hat W = W / \sigma(W)

    :math:`\sigma` by one power iteration a step (torch's default). Convolutions are flattened to `(out, -1)`.

    References:
        Miyato et al., arXiv 1802.05957; `torch.nn.utils.parametrizations.spectral_norm`.
    """

    def prepare(self, model: nn.Module) -> None:
        """Parametrize.

        Args:
            model: the fresh network.
        """
        for target in block_matrices(model):
            parametrizations.spectral_norm(target.module, target.leaf)


class SigmaReparam(Method):
    r"""Divide the weight of every linear and convolution layer by its spectral norm and learn one scale each.

    .. math:: \hat W = \frac{\gamma}{\sigma(W)} W

    :math:`\sigma(W) = u^\top W v` with vectors from an SVD at the start and one power iteration a step; the gradient
    passes through :math:`\sigma`. :math:`\gamma` starts as :math:`\sigma(W_0)`, as in the authors' PyTorch layers, so
    that the network starts as the plain one; their JAX layers start it as 1. The head is included, embeddings are not;
    a weight that is tied to an embedding stays as it is. The matrices of an LSTM count as linear layers.

    References:
        Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy Collapse", arXiv 2303.06296;
        github.com/apple/ml-sigma-reparam, vision/layers.py (`convert_to_sn`).
    """

    def prepare(self, model: nn.Module) -> None:
        """Parametrize.

        Args:
            model: the fresh network.
        """
        embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        layers = [(m, "weight") for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        cells = [(m, name) for m in model.modules() if isinstance(m, nn.RNNBase) for name, _ in m.named_parameters()]
        for module, name in layers + [(module, name) for module, name in cells if name.startswith("weight")]:
            weight = getattr(module, name)
            if id(weight) not in embedded:
                parametrize.register_parametrization(module, name, ScaledBySigma(weight))


class ScaledBySigma(nn.Module):
    """The parametrization behind `SigmaReparam`.

    Args:
        weight: the fresh weight, `(out, ...)`.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        _, S, Vh = torch.linalg.svd(weight.detach().flatten(1), full_matrices=False)
        self.gamma = nn.Parameter(S[0].clone())
        self.register_buffer("right", Vh[0].clone())

    def forward(self, weight: Tensor) -> Tensor:
        """Divide by the spectral norm and scale; moves the vector on while training.

        Args:
            weight: the stored weight.

        Returns:
            The weight that the layer uses.
        """
        matrix = weight.flatten(1)
        with torch.no_grad():
            left = nn.functional.normalize(matrix @ self.right, dim=0)
            right = nn.functional.normalize(matrix.mT @ left, dim=0)
            if self.training:
                self.right.copy_(right)
        return weight * (self.gamma / (left @ matrix @ right))
