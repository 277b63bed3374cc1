# SPDX-License-Identifier: Apache-2.0
r"""The numbers of one step on their way from the device to the host.

# Note [No synchronisation at all]
Reading a number makes the host wait for everything that the device still has to do. A deferred decision starts the
copy into pinned memory behind the work of this step and reads it in the next one, when it has long arrived. Then
the host never waits. The price: smoothing comes one step later, and a gradient that is not finite cannot be dropped
by the host; it is set to zero on the device, at the cost of one pass over the gradients.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pss_param.errors import ArgumentError
from pss_param.sharded import whole_norm

__all__ = ["Reading", "read_now"]


def read_now(norm: float | Tensor, looks: Sequence[Tensor]) -> tuple[float, list[list[float]]]:
    r"""Read the numbers of a step in that step, in one transfer.

    Args:
        norm: The global gradient norm; of a sharded one every rank takes part.
        looks: What the detector measured.

    Returns:
        The norm, and the values of each measurement.

    Raises:
        ArgumentError: If the norm is a tensor of several numbers.

    Example:
        >>> read_now(torch.tensor(2.0), [torch.empty(0)])
        (2.0, [[]])
    """
    for look in looks:
        if look.numel():
            return Reading(norm, looks).read()
    # The normal step: no tensor is made.
    return _number(norm) if isinstance(norm, Tensor) else float(norm), [[] for _ in looks]


def _number(norm: Tensor) -> float:
    try:
        value: float = (norm if type(norm) is Tensor else whole_norm(norm)).item()
    except RuntimeError:
        _require_one(norm)
        raise
    return value


def _require_one(norm: Tensor) -> None:
    if norm.numel() != 1:
        raise ArgumentError(
            f"grad_norm must be one number, got a tensor of shape {tuple(norm.shape)}; "
            "pass what clip_grad_norm_ returns"
        )


class Reading:
    r"""Gradient norm and measurements of one step, in one transfer.

    Args:
        norm: The global gradient norm; of a sharded one every rank takes part.
        looks: What the detector measured.

    Raises:
        ArgumentError: If the norm is a tensor of several numbers.

    Attributes:
        norm: The norm as one plain number or tensor on its device.

    Example:
        >>> reading = Reading(torch.tensor(2.0), [torch.tensor([0.5, 0.25]), torch.empty(0)])
        >>> reading.read()
        (2.0, [[0.5, 0.25], []])
    """

    def __init__(self, norm: float | Tensor, looks: Sequence[Tensor]) -> None:
        if isinstance(norm, Tensor):
            _require_one(norm)
            norm = whole_norm(norm).detach()
        self.norm = norm
        self._sizes = [look.numel() for look in looks]
        measured = [look for look in looks if look.numel()]
        head = self.norm if isinstance(self.norm, Tensor) else torch.tensor(self.norm)
        device = measured[0].device if measured else head.device
        parts = [part.to(device, torch.float64).reshape(-1) for part in (head, *measured)]
        self._packed = torch.cat(parts) if measured else parts[0]
        self._arrived: torch.cuda.Event | None = None

    def send(self) -> "Reading":
        r"""Start the copy to the host and do not wait for it; nothing to do on a CPU.

        Returns:
            This reading.
        """
        if self._packed.is_cuda:
            host = torch.empty(self._packed.shape, dtype=torch.float64, pin_memory=True)
            host.copy_(self._packed, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()
            self._packed = host
        return self

    @classmethod
    def of(cls, state: Sequence[Sequence[float]]) -> "Reading":
        r"""Make a reading that has arrived.

        Args:
            state: What :meth:`state` returned.

        Returns:
            A reading of the same numbers.
        """
        (norm,), *seen = state
        return cls(norm, [torch.tensor(values, dtype=torch.float64) for values in seen])

    def state(self) -> list[list[float]]:
        r"""The numbers as plain lists, to be saved; waits for them.

        Returns:
            The norm in a list of its own, then the values of each measurement.
        """
        norm, seen = self.read()
        return [[norm], *seen]

    def read(self) -> tuple[float, list[list[float]]]:
        r"""Wait for the numbers, if they have not arrived.

        Returns:
            The norm, and the values of each measurement.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        values = self._packed.tolist()
        seen, start = [], 1
        for size in self._sizes:
            seen.append(values[start : start + size])
            start += size
        return values[0], seen
