# SPDX-License-Identifier: Apache-2.0
"""What the tests of the algorithms for many matrices on a GPU share."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pss_param.batch_filter import Ritz


def without_the_third(ritz: Callable[[torch.Tensor, torch.Tensor], Ritz]) -> Callable[..., Ritz]:
    """A Rayleigh-Ritz step that is blind to one direction of the first matrix."""

    def blind(G: torch.Tensor, rows: torch.Tensor) -> Ritz:
        found = ritz(G, rows)
        keep = [i for i in range(rows.shape[1]) if i != 2]
        return Ritz(found.rows[:, keep], *([[column[0][i] for i in keep]] for column in (found.S, found.residual)))

    return blind
