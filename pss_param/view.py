# SPDX-License-Identifier: Apache-2.0
r"""The view: a parametrization that shows a weight, or the smoothed weight while its gate is open.

# Note [Why smoothing waits for the next read]
A detector fires between a backward pass and the optimizer's step. The optimizer moves the weight once more, and
only then is it read again. Smoothing at that read sees the weight that the next forward pass would have used,
costs nothing at the moment of the trigger, and works for weights that are whole only inside a forward pass.

# Note [When a gate may move]
A gate moves between a backward pass and the next forward pass. Where activations are recomputed, a gate that
moved in between would give wrong gradients without an error. It is noticed as follows, at no cost while closed:

- While a backward pass runs, opening, folding, discarding are refused.
- Opened between forward and backward: the recomputation is the first read of an open gate and happens inside a
  backward pass; a first read can only come from a forward pass, so it is refused.
- Discarded between forward and backward: every differentiable read of an open gate leaves a token in its
  autograd graph; the token goes when backward passes it or when the graph is dropped. While one is left,
  discarding is refused.
- Folded between forward and backward: harmless, and so allowed. The stored weight then has, bit for bit, the
  values that the reads had (but for reads of compiled programs on a GPU that is told to multiply in TF32: their
  products cannot be told otherwise, and differ by TF32's rounding of what is taken away).
"""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from pss_param.compiled import note_traced
from pss_param.errors import ArgumentError, NonFiniteError, StateError
from pss_param.factors import Factors, factors_at, factors_of, no_change, padded
from pss_param.matricize import Matricization
from pss_param.pending import PendingReads
from pss_param.precision import full_precision
from pss_param.resharding import ThinSaving
from pss_param.sharded import Cut, Layout, cut_product, is_sharded, local_part, local_product
from pss_param.smoothing import WHOLE_MATRIX_SHAPES, Smoothing
from pss_param.together import Together

__all__ = ["SmoothingView", "inside_backward", "refuse_inside_backward"]


class SmoothingView(nn.Module):
    r"""Show a weight as it is (gate closed) or smoothed (gate open).

    .. math::
        \text{view}(W) = \begin{cases} W & \text{closed: the same tensor object} \\
        W - U \operatorname{diag}(d) V^\mathsf{T} & \text{open} \end{cases}

    :math:`U, d, V` are computed once per opening, at the first read, without gradient; the gradient with respect
    to :math:`W` is that with respect to the view. :func:`pss_param.attach` makes one view per weight. A view can
    also be registered by hand with :func:`torch.nn.utils.parametrize.register_parametrization`; then
    ``module.parametrizations.weight.original`` is the stored weight that :meth:`fold_` takes.

    Args:
        smoothing: Shape, edge and rank of the smoothing; a name stands for ``Smoothing(shape=name)``.
        matricization: How the weight is split into matrices; None for a matrix ``(out, in)``.
        label: The weight's name, for messages and for the seed.
        seed: Together with ``label`` and the number of openings it seeds the view's own random generator; the
            global one is never used.

    Example:
        >>> from torch.nn.utils import parametrize
        >>> layer = torch.nn.Linear(4, 4, bias=False)
        >>> view = SmoothingView()
        >>> _ = parametrize.register_parametrization(layer, "weight", view)
        >>> stored = layer.parametrizations.weight.original
        >>> layer.weight is stored
        True
        >>> view.open()
        >>> shown = layer.weight.detach().clone()
        >>> view.fold_(stored)
        >>> view.is_open, torch.equal(layer.weight, shown)
        (False, True)
    """

    def __init__(
        self,
        smoothing: str | Smoothing = "clip",
        *,
        matricization: Matricization | None = None,
        label: str = "weight",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.smoothing = smoothing if isinstance(smoothing, Smoothing) else Smoothing(shape=smoothing)
        self.matricization = Matricization() if matricization is None else matricization
        self.label, self.seed = label, seed
        self.is_open = False
        # What a read asks: also true of a view that stands by, see Note [Two graphs] of opening.py.
        self.is_read = False
        self.openings = 0
        self.was_read = False
        self.factors: tuple[Factors, ...] | None = None
        self.levels: tuple[Tensor, ...] = ()
        self.pending = PendingReads()
        self.resting: Layout | None = None
        self.together: Together | None = None
        self.thin: ThinSaving | None = None
        # The views of one guard share both, so that it need not ask each of them at every step.
        self.opened: set[str] = set()
        self.tag = ""

    def forward(self, weight: Tensor) -> Tensor:
        r"""Return the weight itself, or the smoothed weight while the gate is open.

        Args:
            weight: The stored weight.

        Returns:
            ``weight`` or a new tensor of its shape and dtype; gradients pass to ``weight`` unchanged.

        Raises:
            StateError: If the gate was opened between a forward pass and its recomputation, or if a compiled
                program reads an open gate whose directions were not prepared.
        """
        if not self.is_read:
            return weight
        if torch.compiler.is_compiling():
            note_traced(self.tag)
            if self.factors is None:
                raise StateError(
                    "a compiled program read an open view whose directions were not prepared; "
                    "pass policy=GuardPolicy(prepare='eager') to pss_param.attach"
                )
            return self.apply_factors(weight, self.factors)
        if not self.is_open:
            return weight
        if self.resting is not None and is_sharded(weight) and weight.device_mesh == self.resting.mesh:
            return weight  # Note [At rest and in forward] of resharding.py
        recomputing = inside_backward()
        if recomputing and not self.was_read:
            raise StateError(
                f"the gate of {self.label} was opened between a forward pass and its backward pass, so "
                "recomputed activations would differ; call guard.step() after backward()"
            )
        self.was_read = True
        shown = self.apply_factors(weight, self.prepare(weight))
        if shown.requires_grad and not recomputing:
            self.pending.watch(shown)
            if self.thin is not None:
                self.thin.mark(shown, weight)
        return shown

    def right_inverse(self, weight: Tensor) -> Tensor:
        r"""Take an assigned value as the stored weight, for views registered by hand.

        Args:
            weight: The value to store.

        Returns:
            The same tensor.
        """
        return weight

    def open(self, levels: tuple[Tensor, ...] = ()) -> None:
        r"""Open the gate: the next read smooths.

        Args:
            levels: What the ``baseline`` edge brings each of the weight's matrices ``(..., m, n)`` to, ``(...)`` each.

        Raises:
            StateError: If the gate is open already or a backward pass is running.
            ArgumentError: If the edge is ``baseline`` and no levels are given.
        """
        refuse_inside_backward("a gate cannot be opened")
        if self.smoothing.edge == "baseline" and not levels:
            raise ArgumentError(
                f"the baseline of {self.label} is in the detector; open it with guard.preview(), or pass "
                f"open(guard.detector.levels({self.label!r}))"
            )
        if self.is_open:
            raise StateError(f"the gate of {self.label} is open already; fold or discard it first")
        self.is_open = self.is_read = True
        self.factors, self.levels = None, levels
        self.opened.add(self.label)

    def stand_by(self, weight: Tensor, rank: int) -> None:
        r"""Let compiled programs read a closed gate as if it were open, with nothing to take away.

        Args:
            weight: The stored weight.
            rank: The rank of the factors of zeros.
        """
        if not self.is_open:
            self.is_read = True
            shape = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
            self.factors = tuple(no_change(part, rank, weight.device) for part in self.matricization.split(shape))

    def fold_(self, weight: Tensor) -> None:
        r"""Write the smoothing into the stored weight, in place, and close the gate; nothing when it is closed.

        Args:
            weight: The stored weight; gets exactly the bits that the open view showed.
        """
        if not self.is_open:
            self._leave()
            return
        refuse_inside_backward("a gate cannot be folded")
        with torch.no_grad():
            # Not through .data: autograd has to see that a tensor it saved was changed.
            factors = self._found(weight) if self.factors is None else self.factors
            if self._is_one_product(weight, factors):
                with full_precision(weight.device):
                    weight.addmm_(*factors_at(weight, factors[0]), alpha=-1)
            else:
                weight.copy_(self.apply_factors(weight, factors))
        self.openings += 1
        self.close()

    def discard(self) -> None:
        r"""Close the gate without a trace in the stored weight; nothing when it is closed.

        Raises:
            StateError: If a backward pass runs or has yet to come for a read of the open gate.
        """
        if not self.is_open:
            self._leave()
            return
        refuse_inside_backward("a gate cannot be discarded")
        if self.pending:
            raise StateError(
                f"{self.label} was read through its open gate and the backward pass of that read has not come; "
                "call backward() first, drop the loss, or read under torch.no_grad()"
            )
        self.openings += 1
        self.close()

    def close(self) -> None:
        r"""Close the gate and forget the directions, whatever is pending: the weight was replaced from outside."""
        self.is_open, self.is_read, self.was_read, self.factors, self.levels = False, False, False, None, ()
        self.opened.discard(self.label)
        self.pending = PendingReads()
        self.resting = self.together = None
        if self.thin is not None:
            self.thin.remove()
            self.thin = None

    def _leave(self) -> None:
        if self.is_read:
            self.close()

    def smoothed(self, weight: Tensor) -> Tensor:
        r"""Compute what the open gate shows, without changing the view.

        Args:
            weight: The stored weight.

        Returns:
            The smoothed weight, bit for bit what the next read returns and what a fold stores.
        """
        factors = self._found(weight) if self.factors is None else self.factors
        return self.apply_factors(weight, factors)

    def prepare(self, weight: Tensor) -> tuple[Factors, ...]:
        r"""Compute the directions once per opening.

        Args:
            weight: The stored weight.

        Returns:
            One pair of factors per matrix (or batch of matrices) that the weight acts as.
        """
        if self.factors is None:
            self.factors = self._found(weight)
        return self.factors

    def pad_factors(self, rank: int) -> None:
        r"""Give prepared factors a fixed rank by adding zeros, so that compiled graphs see one shape.

        Args:
            rank: The new rank; a factor that has more keeps it.
        """
        if self.factors is not None:
            self.factors = tuple(padded(pair, rank) for pair in self.factors)

    def apply_factors(self, weight: Tensor, factors: tuple[Factors, ...]) -> Tensor:
        r"""Subtract ``left @ right`` in the factors' precision and cast once.

        Args:
            weight: The stored weight.
            factors: One pair per matrix of the matricization.

        Returns:
            A new tensor; the gradient passes to ``weight`` unchanged, because nothing but the subtraction and
            the casts is differentiated.
        """
        # Autocast would run the product in bfloat16, an error of 1e-4.
        if torch.compiler.is_compiling():
            with torch.autocast(weight.device.type, enabled=False):
                return self._subtracted(weight, factors)
        with full_precision(weight.device):
            return self._subtracted(weight, factors)

    def _subtracted(self, weight: Tensor, factors: tuple[Factors, ...]) -> Tensor:
        if self._is_one_product(weight, factors):
            return torch.addmm(weight, *factors_at(weight, factors[0]), alpha=-1)
        with torch.no_grad():
            delta = self._delta(weight, factors)
        if delta._base is not None:  # autograd refuses to write into a view made without gradients
            return (weight.to(delta.dtype) - delta).to(weight.dtype)
        # In the buffer of the product: an open gate needs one more weight at a time, not two.
        return delta.neg_().add_(weight).to(weight.dtype)

    def _is_one_product(self, weight: Tensor, factors: tuple[Factors, ...]) -> bool:
        # Then one kernel reads and writes the weight once, and in place it gives the same bits as into a new tensor.
        plain = self.matricization.linear and self.resting is None and not is_sharded(weight)
        return plain and weight.dtype == factors[0].left.dtype and weight.is_contiguous()

    def _delta(self, weight: Tensor, factors: tuple[Factors, ...]) -> Tensor:
        if is_sharded(weight):
            return self._local_delta(weight, factors)
        factors = tuple(factors_at(weight, pair) for pair in factors)
        if self.matricization.linear and self.resting is not None:
            return cut_product(*factors[0], self._cut(weight))
        parts = tuple(left @ right for left, right in factors)
        if self.matricization.linear:
            return parts[0]
        # Parts that are left alone lose nothing; join would take them from the weight.
        # Detached, because einops keeps a list of the types it has seen, and a compiled program is bound to its length.
        like = torch.zeros_like(weight, dtype=parts[0].dtype) if self.matricization.only else weight.detach()
        return self.matricization.join(parts, like)

    def _local_delta(self, weight: Any, factors: tuple[Factors, ...]) -> Tensor:
        # Every rank has the thin factors and makes its own piece of their product: nothing is communicated.
        if self.matricization.linear:
            return local_product(weight, *factors[0], self._cut(weight))
        whole = torch.zeros(weight.shape, dtype=factors[0].left.dtype, device=weight.to_local().device)
        return local_part(weight, self._delta(whole, factors))

    def _cut(self, weight: Tensor) -> Cut:
        # Note [The same bits cut and whole] of sharded.py; at rest a shard is one piece.
        if self.resting is None or (is_sharded(weight) and weight.device_mesh == self.resting.mesh):
            return Cut()
        return self.resting.cut_of(weight)

    def generator(self, device: torch.device) -> torch.Generator:
        r"""The source of random numbers of the present opening.

        Args:
            device: Where it draws.

        Returns:
            A fresh generator.
        """
        return torch.Generator(device=device).manual_seed(self._seed_now())

    def _found(self, weight: Tensor) -> tuple[Factors, ...]:
        """The directions: Note [Found together] of together.py, or this weight's by themselves."""
        # inference_mode would make tensors that a later training step cannot use.
        with torch.inference_mode(False), torch.no_grad():
            found = None if self.together is None else self.together.factors_of(self, weight)
        return self._decompose(weight) if found is None else found

    def _decompose(self, weight: Tensor) -> tuple[Factors, ...]:
        with torch.inference_mode(False), torch.no_grad():
            generator = self.generator(weight.device)
            try:
                parts = self._matrices(weight.detach())
                return factors_of(parts, self.smoothing, generator, self.levels)
            except NonFiniteError as error:
                raise NonFiniteError(f"{self.label} cannot be smoothed: {error}") from error

    def _matrices(self, weight: Any) -> tuple[Tensor, ...]:
        # A sharded matrix stays where it is; what is a packing of several has to be whole to be unpacked.
        if not is_sharded(weight):
            return self.matricization.split(weight)
        if self.matricization.linear and self.smoothing.shape not in WHOLE_MATRIX_SHAPES:
            return (weight,)
        return self.matricization.split(weight.full_tensor())

    def _seed_now(self) -> int:
        text = f"{self.seed}/{self.label}/{self.openings}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")

    def extra_repr(self) -> str:
        r"""Describe smoothing and gate.

        Returns:
            Shape, edge and the gate's position.
        """
        gate = "open" if self.is_open else "closed"
        return f"{self.smoothing.shape} to the {self.smoothing.edge} edge, gate {gate}"


def refuse_inside_backward(what: str) -> None:
    r"""Refuse what would be silently wrong while a backward pass runs.

    Args:
        what: The refused action, as the beginning of a sentence.

    Raises:
        StateError: If a backward pass is running in this thread.
    """
    if inside_backward():
        raise StateError(f"{what} while a backward pass runs; do it after backward() has returned")


# The same question that torch.utils.checkpoint asks; torch has no public name for it.
_graph_task = torch._C._current_graph_task_id


def inside_backward() -> bool:
    r"""Tell whether a backward pass runs in this thread.

    Returns:
        Whether one does.

    Example:
        >>> inside_backward()
        False
    """
    return bool(_graph_task() != -1)
