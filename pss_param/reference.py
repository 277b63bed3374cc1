# SPDX-License-Identifier: Apache-2.0
r"""A healthy checkpoint of the same model, from which tensors are taken or measured."""

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from types import TracebackType

from torch import Tensor

from pss_param.checkpoint import open_checkpoint
from pss_param.counterparts import pair_names
from pss_param.errors import ArgumentError, NonFiniteError
from pss_param.finite import count_nonfinite
from pss_param.options import Reference
from pss_param.plan import StateDictSource, TensorSource


class HealthySource:
    r"""Finds counterparts of tensors; a context manager that holds the reference open.

    Names may differ by what trainers put in front of them: :mod:`pss_param.counterparts`.

    Args:
        reference: path of a checkpoint of any format, a state dict, or None.
        names: keys of the tensors whose counterparts are wanted.

    Raises:
        CheckpointError: the reference cannot be read.
        ArgumentError: it is neither a path nor a state dict, or has none of the tensors.
    """

    def __init__(self, reference: Reference | None, names: Iterable[str]) -> None:
        r"""See the class."""
        self.reference, self._wanted = reference, tuple(names)
        self._source: TensorSource | None = None
        self._names: dict[str, str] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "HealthySource":
        r"""Open the reference.

        Returns:
            The source itself.
        """
        with ExitStack() as stack:
            if isinstance(self.reference, Mapping):
                self._source = StateDictSource(self.reference)
            elif self.reference is not None:
                _check_path(self.reference)
                self._source = stack.enter_context(open_checkpoint(self.reference))
            if self._source is not None:
                self._names = self._paired(self._source)
            self._stack = stack.pop_all()
        return self

    def _paired(self, source: TensorSource) -> dict[str, str]:
        try:
            return pair_names(self._wanted, source.tensors)
        except ArgumentError as error:
            raise ArgumentError(f"the checkpoint and its reference {error}") from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        r"""Close the reference."""
        self._stack.close()

    def has(self, name: str) -> bool:
        r"""Say whether there is a counterpart of this name.

        Args:
            name: key of a tensor.

        Returns:
            The answer.
        """
        return self._source is not None and self._names.get(name, name) in self._source.tensors

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        r"""Read a counterpart.

        Args:
            name: key of the tensor.
            shape: its shape.

        Returns:
            The counterpart, finite, of this shape and its own type.

        Raises:
            ArgumentError: the reference has none that fits.
            NonFiniteError: it holds NaN or infinity.
        """
        source = self._source
        key = self._names.get(name, name)
        stored = None if source is None else source.tensors.get(key)
        if source is None or stored is None or stored.shape != shape or not stored.floating:
            found = "does not have it" if stored is None else f"has it as {stored.dtype_name} {stored.shape}"
            raise ArgumentError(
                f"{name} {shape} needs its counterpart, but the reference {found}; "
                "name a checkpoint of the same model, or exclude the tensor"
            )
        if count := count_nonfinite(source.blocks(key)):
            raise NonFiniteError(f"the reference has {count} non-finite value(s) in {key}; name a healthy one")
        return source.read(key)

    @property
    def present(self) -> bool:
        r"""Whether there is a reference."""
        return self._source is not None


def _check_path(reference: object) -> None:
    if not isinstance(reference, str | os.PathLike):
        raise ArgumentError(
            f"reference must be a path or a state dict, got {type(reference).__name__}; pass model.state_dict()"
        )
