# SPDX-License-Identifier: Apache-2.0
"""Methods that hold the logits of attention."""

from typing import Any

import torch
from torch import Tensor, nn

from .base import Method

_CONTRACT = ("q_proj", "k_proj", "heads", "qk_norm", "record")


def attentions(model: nn.Module) -> list[Any]:
    """The attention modules, told by what they have.

    Args:
        model: the network.

    Returns:
        Modules with `q_proj`, `k_proj`, `heads`, `qk_norm` and `record`.
    """
    return [module for module in model.modules() if all(hasattr(module, name) for name in _CONTRACT)]


class QKNorm(Method):
    r"""Normalise queries and keys of every head before their product.

    .. math:: q \leftarrow q / \operatorname{rms}(q), \qquad k \leftarrow k / \operatorname{rms}(k)

    without learned scales; no logit exceeds :math:`\sqrt{d}`, `d` the size of a head.

    References:
        Henry et al., arXiv 2010.04245 (L2 norm and one learned scale); Dehghani et al., arXiv 2302.05442 (layer norm).
        The RMS norm per head is today's usual form; the scale is left out, so that no logit can grow.
    """

    def fits(self, model: nn.Module) -> bool:
        """Whether the network has attention.

        Args:
            model: the network.

        Returns:
            The answer.
        """
        return bool(attentions(model))

    def prepare(self, model: nn.Module) -> None:
        """Switch it on.

        Args:
            model: the fresh network.
        """
        for module in attentions(model):
            module.qk_norm = True


class QKClip(Method):
    r"""After each step, shrink the query and key rows of every head whose largest logit exceeded a threshold.

    .. math:: \gamma_h = \min(1, \tau / S^h_{\max}), \qquad W_q^h \leftarrow \sqrt{\gamma_h} \, W_q^h, \quad
        W_k^h \leftarrow \sqrt{\gamma_h} \, W_k^h

    with :math:`S^h_{\max}` the largest logit (after the scaling by :math:`1 / \sqrt d`) of this step's forward pass.
    Biases, which the source's model has not, shrink with their rows, so that logits scale by :math:`\gamma_h` exactly.
    `events` counts steps in which any head was shrunk.

    Args:
        threshold: :math:`\tau`; 100 in Kimi K2, 30 in the report's small models (appendix D). The suite runs both.

    References:
        Kimi Team, "Kimi K2: Open Agentic Intelligence", arXiv 2507.20534 (MuonClip); kexue.fm/archives/11126.
    """

    def __init__(self, threshold: float = 100.0) -> None:
        self.threshold = threshold
        self.modules: list[Any] = []

    def fits(self, model: nn.Module) -> bool:
        """Whether the network has attention.

        Args:
            model: the network.

        Returns:
            The answer.
        """
        return bool(attentions(model))

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int) -> None:
        """Let attention record its logits.

        Args:
            model: the network.
            optimizer: not used.
            total_steps: not used.
        """
        self.modules = attentions(model)
        for module in self.modules:
            module.record = True

    def after_step(self, step: int) -> None:
        """Shrink.

        Args:
            step: not used.
        """
        self.events += sum(self._shrink(module) for module in self.modules) > 0

    def _shrink(self, module: Any) -> bool:
        largest: Tensor = module.max_logit
        above = largest > self.threshold
        if not bool(above.any()):
            return False
        factors = torch.where(above, self.threshold / largest, 1.0).sqrt()
        for layer in (module.q_proj, module.k_proj):
            _scale_heads(layer.weight, factors)
            if layer.bias is not None:
                _scale_heads(layer.bias, factors)
        return True


@torch.no_grad()
def _scale_heads(parameter: Tensor, factors: Tensor) -> None:
    # Rows of one head lie together: (heads * size, ...).
    per_row = factors.repeat_interleave(parameter.shape[0] // factors.numel())
    parameter.mul_(per_row.reshape(-1, *[1] * (parameter.dim() - 1)).to(parameter.dtype))
