# SPDX-License-Identifier: Apache-2.0
r"""What a smoothing takes away, kept in factors and applied without forming a second matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pss_param.errors import NonFiniteError
from pss_param.precision import full_precision

# Elements of W that one step of an in-place correction holds in float32 beside the stored dtype.
_ROW_BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Correction:
    r"""What a smoothing takes away, in factors: :math:`W^* = W - U \,\mathrm{diag}(d)\, V^H`.

    Attributes:
        U: left directions, ``(..., m, r)``, float32 or wider.
        d: how much each value falls, ``S - f(S)``, ``(..., r)``; negative where a sum-keeping shape raises a value.
        Vh: right directions, ``(..., r, n)``.
        S: the dominant values before, ``(..., r)``; zero beyond a matrix's own ``k``.
        k: dominant values of each matrix, ``(...)``.
        edge: the level they came down to, ``(...)``; 0 where there is none and the matrix is left as it is.
        stable_rank: before, ``(...)``.
        spectral_norm: before, ``(...)``.
        residual: of each triplet, relative to ``S[0]``, ``(..., r)``.
        error: certified bound on the error of the smoothed matrix over ``||W||_F``, ``(...)``.
        converged: whether that is within the asked tolerance, ``(...)``.
    """

    U: Tensor
    d: Tensor
    Vh: Tensor
    S: Tensor
    k: Tensor
    edge: Tensor
    stable_rank: Tensor
    spectral_norm: Tensor
    residual: Tensor
    error: Tensor
    converged: Tensor

    @property
    def is_noop(self) -> bool:
        """Whether no direction changes; reads one flag from the device."""
        return self.d.numel() == 0 or not bool(self.d.any())

    @torch.no_grad()
    def apply(self, W: Tensor) -> Tensor:
        """The smoothed matrix as a new tensor.

        Args:
            W: the matrix that the correction was computed from, ``(..., m, n)``.

        Returns:
            ``W - U diag(d) Vh`` in the dtype of ``W``: arithmetic in float32 or wider, one cast; ``W``'s own bits
            where nothing changes.

        Raises:
            NonFiniteError: the smoothed values do not fit the dtype of ``W``.
        """
        return self.apply_(W.clone(memory_format=torch.contiguous_format))

    @torch.no_grad()
    def apply_(self, W: Tensor) -> Tensor:
        """The same in place, holding blocks of rows in float32 rather than the whole matrix.

        Args:
            W: the matrix that the correction was computed from, ``(..., m, n)``; may be a strided view.

        Returns:
            ``W`` itself.

        Raises:
            NonFiniteError: the smoothed values do not fit the dtype of ``W``; then some rows may have been written.
        """
        if self.is_noop:
            return W
        with full_precision(W.device):
            left = self.U * self.d[..., None, :]
            rows = max(1, _ROW_BLOCK_ELEMENTS // max(1, W.numel() // W.shape[-2]))
            for start in range(0, W.shape[-2], rows):
                _subtract_(W[..., start : start + rows, :], left[..., start : start + rows, :], self.Vh)
        return W


def _subtract_(block: Tensor, left: Tensor, right: Tensor) -> None:
    if block.dtype == left.dtype and block.dim() == 2:
        block.addmm_(left, right, alpha=-1)
        return
    smoothed = (block.to(left.dtype) - left @ right).to(block.dtype)
    if block.dtype == torch.float16 and not bool(torch.isfinite(smoothed).all()):
        raise NonFiniteError(
            "smoothed values must fit the stored dtype, but they overflow float16; store the weight in float32"
        )
    block.copy_(smoothed)
