# SPDX-License-Identifier: Apache-2.0
r"""The list from which PyTorch's recurrent layers read their weights, under views.

``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` hand a list of their weights to one kernel. It is an attribute, brought up to
date in the forward pass where a weight has become another tensor; so it would keep what an open gate showed, with its
graph, until the next pass, and a module that holds such a tensor cannot be copied. While views are over its weights the
list is therefore made anew at each read, and what lies in its place are the stored Parameters.
"""

from torch import Tensor, nn

__all__ = ["flat_weights"]


def _read(module: nn.RNNBase) -> list[Tensor | None]:
    return [getattr(module, name, None) for name in module._flat_weights_names]


def _write(module: nn.RNNBase, weights: list[Tensor | None]) -> None:
    vars(module)["_flat_weights"] = [module._parameters.get(name) for name in module._flat_weights_names]


flat_weights = property(_read, _write)
"""For the class of a recurrent layer with views."""
