# SPDX-License-Identifier: Apache-2.0
r"""What a repair is asked to do, and what it tells while it works."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pss_param.edges import EDGES
from pss_param.errors import ArgumentError
from pss_param.smoothing import Smoothing
from pss_param.targets import TargetRules

StateDict = Mapping[str, Any]
Stage = Literal["copy", "repair", "verify", "scan"]
Reference = str | os.PathLike[str] | StateDict


WORDS = {
    "nonfinite": ("refuse", "reference"),
    "where": ("all", "drifted"),
    "optimizer": ("auto", "keep", "reset", "reset-all"),
    "strength": ("auto", "gentle", "deep"),
}
"""Options of few words, with the words."""


@dataclass(frozen=True)
class Progress:
    r"""One step of the work.

    Args:
        stage: ``"copy"``, ``"repair"``, ``"verify"`` or ``"scan"``.
        name: the tensor at work, or empty.
        done: bytes of this stage that are done.
        total: bytes of this stage.
    """

    stage: Stage
    name: str
    done: int
    total: int


ProgressHook = Callable[[Progress], None]


@dataclass(frozen=True)
class RepairOptions:
    r"""What to smooth and how.

    In the tables of rescues in ``examples/benchmarks/results/stability.md`` the defaults are ``repair``, beside either
    strength for all (``repair-gentle``, ``repair-deep``), other edges (``repair-dominant``, ``repair-init``) and shapes
    (``msign``, ``noise``), kept moments (``repair-keep``), and a deep repair with one thing changed (``deep-...``).

    Args:
        smoothing: shape by which dominant singular values come down, a name or a callable ``f(S, edge) -> S``; None
            for ``"clip"``, or ``"equal"`` in a deep repair to the edge ``"init"``.
        edge: the level they come down to: ``"bulk"``, ``"dominant"``, ``"mild"``, ``"init"`` or ``"reference"``; None
            for ``"bulk"``, or ``"init"`` in a deep repair.
        rank: number of directions to smooth; None lets the edge decide.
        init_std: standard deviation of a fresh weight, for the edges "init" and "mild"; None asks the model's config,
            then takes PyTorch's rule ``1 / sqrt(3 * fan_in)``. ``strength="auto"`` judges growth by it.
        tol: residual of the dominant directions at which the computation may stop, relative to the spectral
        norm.
        targets: preset of weights: ``"linear"``, ``"attention"``, ``"qk"``, ``"mlp"`` or ``"all"``.
        include: patterns of names to take as well.
        exclude: patterns of names to leave alone, NaN or infinity in them too; wins over everything.
        per_head: whether each attention head is a matrix of its own.
        reference: a healthy checkpoint of any format (path or state dict): for ``edge="reference"``,
            ``nonfinite="reference"`` and ``where="drifted"``; drift against it is reported in any case.
        nonfinite: what to do with tensors that hold NaN or infinity: ``"refuse"`` the checkpoint, or take them
            from the ``"reference"``; those are not smoothed. Masks are left as they are: :mod:`pss_param.by_design`.
        where: which targets to smooth: ``"all"``, or those that ``"drifted"`` from the reference.
        drifted_below: a tensor has drifted where the stable rank of one of its matrices is below this fraction
            of the reference's.
        optimizer: moments of the optimizer: ``"keep"`` them, ``"reset"`` those of the repaired parameters to
            their initial state, or ``"reset-all"``. ``"auto"`` keeps them in a gentle repair and resets all in a deep
            one, whose weights the moments no longer fit; see :mod:`pss_param.optimizer_edit`.
        param_order: file of :func:`pss_param.write_param_order`, where the state numbers its parameters.
        verify: whether to read the copy again before it gets its name.
        device: where to compute: ``"auto"`` (a CUDA device if there is one), ``"cpu"``, ``"cuda:1"``, ...
        seed: of the random start of the iteration; the same seed and device give the same bytes.
        strength: ``"auto"`` chooses by how far the matrices inside the blocks have outgrown fresh ones, see
            :mod:`pss_param.strength`, and is ``"gentle"`` where edge, smoothing, rank, targets or where are given.
            ``"gentle"`` brings down what stands out of the matrices inside the blocks and keeps the rest.
            ``"deep"`` undoes all that a deadly learning rate does: all matrices get equal singular values at 1.2 times
            the Frobenius norm of fresh ones, heads, tables that are heads as well and stems at 2.4 times, token
            embeddings beside a head of their own at the norm that they have; matrices that outgrow fresh ones in health
            too (:mod:`pss_param.room`) are clipped at three times a fresh one's spectral norm, kernels of one input
            channel at twice; gains of norms go back to 1 and biases to 0. Tables that are added to one that is a head
            come down to the norm of fresh ones; other embeddings stay.
    """

    smoothing: str | Callable[[Tensor, Tensor], Tensor] | None = None
    edge: str | None = None
    rank: int | None = None
    init_std: float | None = None
    tol: float = 1e-3
    targets: str = "linear"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    per_head: bool = False
    reference: Reference | None = None
    nonfinite: str = "refuse"
    where: str = "all"
    drifted_below: float = 0.5
    optimizer: str = "auto"
    param_order: str | os.PathLike[str] | None = None
    verify: bool = True
    device: str = "auto"
    seed: int = 0
    strength: str = "auto"

    def __post_init__(self) -> None:
        r"""Check what can be checked without a checkpoint.

        Raises:
            ArgumentError: a value breaks a rule.
        """
        self._check_words()
        if self.edge is not None and self.edge not in EDGES:
            raise ArgumentError(f"edge must be one of {', '.join(EDGES)}, got {self.edge!r}")
        wanting = {
            'edge="reference"': self.edge,
            'nonfinite="reference"': self.nonfinite,
            'where="drifted"': self.where,
        }
        for words, value in wanting.items():
            if value in {"reference", "drifted"} and self.reference is None:
                raise ArgumentError(f"{words} needs a healthy checkpoint; pass reference (--reference GOOD)")
        if not 0 < self.drifted_below <= 1:
            raise ArgumentError(f"drifted_below must be above 0 and at most 1, got {self.drifted_below:g}")
        if self.init_std is not None and self.rule().edge != "init" and not self.open:
            raise ArgumentError(f'init_std is only used by edge="init", the edge is {self.rule().edge!r}')
        if self.deep and (self.targets != "linear" or self.where != "all"):
            raise ArgumentError(
                f'strength="deep" treats the whole model, got targets={self.targets!r} and where={self.where!r}; '
                "leave both at their defaults, or use exclude"
            )
        self.rules()
        self.rule()

    def _check_words(self) -> None:
        for name, words in WORDS.items():
            if getattr(self, name) not in words:
                raise ArgumentError(f"{name} must be one of {', '.join(words)}, got {getattr(self, name)!r}")

    def rules(self) -> TargetRules:
        r"""Which weights.

        Returns:
            The rules for :func:`pss_param.targets.select_tensors`.
        """
        return TargetRules(
            preset=self.targets,
            include=tuple(self.include),
            exclude=tuple(self.exclude),
            per_head=self.per_head,
        )

    def rule(self) -> Smoothing:
        r"""What happens to a weight; values that differ from weight to weight are still open.

        Returns:
            The smoothing.
        """
        edge = self.edge or ("init" if self.deep else "bulk")
        shape = self.smoothing or ("equal" if self.deep and edge == "init" else "clip")
        reference = 1.0 if edge == "reference" else None  # stands in until a tensor's own is known
        return Smoothing(shape, edge, self.rank, self.init_std, reference, self.tol)

    @property
    def deep(self) -> bool:
        r"""Whether more than the targets is treated."""
        return self.strength == "deep"

    @property
    def open(self) -> bool:
        r"""Whether the strength is to be chosen by what the checkpoint holds, since nothing else says how to smooth."""
        said = (self.edge, self.smoothing, self.rank) != (None, None, None)
        return self.strength == "auto" and not said and (self.targets, self.where) == ("linear", "all")

    def to_dict(self) -> dict[str, Any]:
        r"""The options in plain Python types, for the report.

        Returns:
            One entry per field.
        """
        content = {name: getattr(self, name) for name in self.__dataclass_fields__}
        shape, content["edge"] = self.rule().shape, self.rule().edge
        content["smoothing"] = getattr(shape, "__qualname__", repr(shape)) if callable(shape) else shape
        if isinstance(self.reference, Mapping):
            content["reference"] = "state dict"
        for name in ("reference", "param_order"):
            if isinstance(content[name], os.PathLike):
                content[name] = os.fspath(content[name])
        return {name: list(value) if isinstance(value, tuple) else value for name, value in content.items()}


def pick_device(name: str) -> torch.device:
    r"""Turn the name of a device into a device that is there.

    Args:
        name: ``"auto"`` or any name that torch knows.

    Returns:
        The device.

    Raises:
        ArgumentError: torch does not know it, or this machine does not have it.

    Example:
        >>> pick_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (
        RuntimeError,
        AssertionError,
        NotImplementedError,
    ) as error:  # torch says "not here" in all three ways
        reason = str(error).strip().splitlines()[0][:120]
        raise ArgumentError(f"device {name!r} cannot be used here ({reason}); use auto or cpu") from None
    if device.type == "meta":
        raise ArgumentError("device 'meta' holds no values; use auto or cpu")
    return device
