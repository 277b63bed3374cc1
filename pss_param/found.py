# SPDX-License-Identifier: Apache-2.0
"""What every algorithm of :mod:`pss_param.solver` returns."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from pss_param.certificate import Verdict


@dataclass(frozen=True)
class Found:
    """Dominant triplets of one matrix, scaled to ``||W||_F = 1``.

    Attributes:
        U: ``(m, k)``.
        S: ``(k,)``.
        Vh: ``(k, n)``.
        residual: ``||W^T u - s v||`` of each, ``(k,)``.
        top: the largest singular value, also where ``k = 0``.
        verdict: ``k``, edge and error.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    residual: Tensor
    top: float
    verdict: Verdict

    @property
    def of_transpose(self) -> Found:
        """The same triplets of ``W^T``."""
        return replace(self, U=self.Vh.mT, Vh=self.U.mT)
