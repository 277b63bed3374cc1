# SPDX-License-Identifier: Apache-2.0
r"""The stable-rank floor: a detector that watches the weights instead of the gradient."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pss_param.detector import Detector, Matrix, Verdict, WeightSource
from pss_param.errors import ArgumentError
from pss_param.sharded import ShardedMatrix

__all__ = ["StableRankFloor"]


class StableRankFloor(Detector):
    r"""Trigger for each weight whose stable rank falls below a fraction of what it was at attach.

    .. math::
        \operatorname{SR}(W_t) < \text{fraction} \cdot \operatorname{SR}(W_0), \qquad
        \operatorname{SR}(W) = \lVert W \rVert_F^2 / \sigma_1^2.

    It sees what the gradient norm hides: at large learning rates without warm-up gradients only shrink while the
    weights collapse. A weight that acts as several matrices (fused query/key/value, experts) is judged by the
    one that lost most.

    Every ``period`` steps each weight is read twice: once for its norm and once for half an iteration of power
    iteration, started from the vector of the last time. Weights move little in ``period`` steps, so the vector
    stays converged; at attach, ``settle_iterations`` full iterations are made. :math:`\sigma_1` is estimated
    from below, so a stable rank is never underestimated and no trigger is owed to the estimate.

    ``fraction=0.5`` because healthy runs lose a third in single matrices; ``period=10`` costs a fraction of a
    percent of a step and is short against the tens of steps in which weights collapse.

    Args:
        fraction: The floor as a fraction of the stable rank at attach, in (0, 1), dimensionless.
        period: Steps between two measurements.
        seed: Seed of the start vectors.

    Raises:
        ArgumentError: If an argument is out of its range.

    Example:
        >>> weights = {"w": (torch.eye(8),)}
        >>> detector = StableRankFloor(period=1)
        >>> detector.bind(lambda: weights)
        >>> _ = weights["w"][0][0, 0].fill_(4.0)
        >>> for _ in range(8):
        ...     seen = detector.look(lambda: weights)
        >>> detector.judge(1.0, [part.tolist() for part in seen]).names
        ('w',)
    """

    parts = 1
    settle_iterations = 12
    step: Tensor
    baseline: Tensor

    def __init__(self, fraction: float = 0.5, period: int = 10, seed: int = 0) -> None:
        super().__init__()
        if not 0 < fraction < 1:
            raise ArgumentError(f"fraction must lie in (0, 1), got {fraction}; 0.5 is the default")
        if period < 1:
            raise ArgumentError(f"period must be at least 1 step, got {period}")
        self.fraction, self.period, self.seed = float(fraction), int(period), int(seed)
        self.names: tuple[str, ...] = ()
        self.vectors: list[list[Tensor]] = []
        self.on_left = False
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("baseline", torch.zeros(0, dtype=torch.float64))

    @torch.no_grad()
    def bind(self, weights: WeightSource) -> None:
        r"""Measure the stable ranks that later ones are compared with.

        Args:
            weights: Returns the watched matrices by name.
        """
        current = weights()
        self.names = tuple(current)
        self.on_left = False
        self.vectors = [[self._start(matrix) for matrix in matrices] for matrices in current.values()]
        for _ in range(2 * self.settle_iterations):
            sigmas = self._iterate(current)
        self.baseline = torch.cat(self._stable_ranks(current, sigmas)).cpu()

    @torch.no_grad()
    def look(self, weights: WeightSource) -> list[Tensor]:
        r"""Measure all stable ranks every ``period`` steps, one tensor for the whole model.

        Args:
            weights: Returns the watched matrices by name.

        Returns:
            One tensor: the current stable ranks in the order of ``names``, empty between two measurements.

        Raises:
            ArgumentError: If the weights are not those of :meth:`bind`.
        """
        self.step.add_(1)
        if int(self.step) % self.period:
            return [torch.empty(0, dtype=torch.float64)]
        current = weights()
        if tuple(current) != self.names:
            raise ArgumentError(
                f"StableRankFloor was bound to {len(self.names)} weights and now sees other ones "
                f"({len(current)}); attach a new guard after changing the model"
            )
        return [torch.cat(self._stable_ranks(current, self._iterate(current)))]

    def judge(self, norm: float, seen: Sequence[Sequence[float]]) -> Verdict:
        r"""Compare the measured stable ranks with the floor.

        Args:
            norm: Not used.
            seen: What :meth:`look` measured.

        Returns:
            The decision with the names of the weights below the floor.
        """
        (ranks,) = seen
        if not ranks:
            return Verdict()
        lowest = dict.fromkeys(self.names, math.inf)
        for name, now, then in zip(self._owners(), ranks, self.baseline.tolist(), strict=True):
            lowest[name] = min(lowest[name], now / then if then > 0 else math.inf)
        low = tuple(name for name, value in lowest.items() if value < self.fraction)
        if not low:
            return Verdict()
        worst = min(low, key=lambda name: lowest[name])
        reason = f"stable rank of {len(low)} weight(s) fell below {self.fraction:g} x its value at attach"
        return Verdict(True, low, reason=f"{reason} (lowest {lowest[worst]:.2f} x in {worst})")

    def _owners(self) -> list[str]:
        sizes = [sum(math.prod(v.shape[:-2]) for v in vectors) for vectors in self.vectors]
        return [name for name, size in zip(self.names, sizes, strict=True) for _ in range(size)]

    def _start(self, matrix: Matrix) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        vector = torch.randn((*matrix.shape[:-2], matrix.shape[-1], 1), generator=generator)
        return nn.functional.normalize(vector, dim=-2).to(matrix.device)

    def _iterate(self, current: Mapping[str, tuple[Matrix, ...]]) -> list[list[Tensor]]:
        # Vectors of length n are multiplied by W, those of length m by its transpose: half an iteration each.
        sigmas = []
        for vectors, matrices in zip(self.vectors, current.values(), strict=True):
            sides = [matrix.mT if self.on_left else matrix for matrix in matrices]
            steps = [_half_iteration(side, vector) for side, vector in zip(sides, vectors, strict=True)]
            vectors[:] = [vector for vector, _ in steps]
            sigmas.append([sigma for _, sigma in steps])
        self.on_left = not self.on_left
        return sigmas

    @staticmethod
    def _stable_ranks(current: Mapping[str, tuple[Matrix, ...]], sigmas: list[list[Tensor]]) -> list[Tensor]:
        pairs = [
            (matrix, sigma)
            for matrices, values in zip(current.values(), sigmas, strict=True)
            for matrix, sigma in zip(matrices, values, strict=True)
        ]
        return [(_frobenius(matrix) / sigma).square().double().flatten() for matrix, sigma in pairs]

    def get_extra_state(self) -> dict[str, Any]:
        r"""Hold the warm vectors, without which a resumed run would measure other last bits.

        Returns:
            The vectors by position and the side of the matrices that they belong to.
        """
        flat = [vector for vectors in self.vectors for vector in vectors]
        return {"on_left": self.on_left, "vectors": {str(i): v.clone() for i, v in enumerate(flat)}}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        r"""Take the warm vectors back.

        Args:
            state: What :meth:`get_extra_state` returned.

        Raises:
            ArgumentError: If it belongs to another set of weights.
        """
        saved = [state["vectors"][str(i)] for i in range(len(state["vectors"]))]
        here = [vector for vectors in self.vectors for vector in vectors]
        if len(saved) != len(here):
            raise ArgumentError(
                f"the saved detector watched {len(saved)} matrices and this one watches {len(here)}; "
                "attach with the same targets before loading"
            )
        moved = iter([old.to(new.device, copy=True) for old, new in zip(saved, here, strict=True)])
        self.vectors = [[next(moved) for _ in vectors] for vectors in self.vectors]
        self.on_left = bool(state["on_left"])

    def extra_repr(self) -> str:
        r"""Describe the settings.

        Returns:
            The settings as they are passed to the constructor.
        """
        return f"fraction={self.fraction:g}, period={self.period}"


def _frobenius(matrix: Matrix) -> Tensor:
    if isinstance(matrix, ShardedMatrix):
        return matrix.frobenius_norm()
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(matrix, dim=(-2, -1), dtype=dtype)
    return norm


def _half_iteration(matrix: Matrix, vector: Tensor) -> tuple[Tensor, Tensor]:
    # A vector of zeros or NaN would stay one for ever, so it is replaced; this step then measures nothing.
    image = (matrix @ vector.to(matrix.dtype)).to(torch.promote_types(matrix.dtype, torch.float32))
    sigma = torch.linalg.vector_norm(image, dim=-2, keepdim=True)
    start = nn.functional.normalize(
        torch.linspace(1, 2, image.shape[-2], dtype=image.dtype, device=image.device), dim=0
    )
    usable = torch.isfinite(sigma) & (sigma > 0)
    following = torch.where(usable, image / sigma, start.unsqueeze(-1))
    return following, sigma[..., 0, 0]
