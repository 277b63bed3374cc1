# SPDX-License-Identifier: Apache-2.0
r"""How strong a repair has to be, judged by how far the matrices inside the blocks have outgrown fresh ones.

# Note [Why growth decides]
A deadly learning rate leaves a network whose matrices, norms and biases have all grown, and cutting what stands out of
the matrices then brings little back. Of networks that had learned and were then killed
(``examples/benchmarks/results/stability.md``), a gentle repair brought half back to learning, far behind fresh weights
trained for as long, and a deep one all, level with those or ahead. Their median growth (``What a repair judges by``
there) was 2.3 to 360, that of the same networks in health 1.0 to 1.9 (the LSTM's 10 to 11), where the gentle repair
lost next to nothing. In a post-norm GPT and a perceptron five steps at the deadly rate had made it 1.2 to 1.5, and they
lived; ten 2.2 to 3.1, and what went on from there fell behind; twenty 3.5 to 5.1, and they were dead. Kernels before a
batch norm grow without harm, to 5 times a fresh one's in health and more than 35 in death, so theirs counts over
:data:`pss_param.room.DEEP`. Growth is no proof: recurrent matrices (10 times in health, 5 to 19 in death) and all after
very long training (6 in a pretrained MiniLM) have outgrown fresh ones as well, and numbers alone cannot tell. So the
choice is told, with its reason and the other one; a healthy checkpoint as ``reference`` takes the place of the fresh
matrices, and :func:`pss_param.probe_repairs` of all guessing. Where it is wrong, it costs little: a deep repair lost
healthy networks 0.08 nats at most after as many steps again.

# Note [Grown, or drawn larger]
Where no config and no option says how a fresh matrix was drawn, PyTorch's own rule is taken, and other initialisers
draw larger: He's 2.4 times, 0.02 at a width of 4096 2.2 times. Such a matrix is flat, as independent entries are, and
what a deadly rate leaves is not: its stable rank was 0.09 to 0.44 of a fresh one's (medians of the networks above, that
of healthy ones 0.4 to 1.1, the LSTM's apart). Only under Muon, whose updates have equal singular values, matrices stay
as flat as fresh ones, and then they had grown 10 to 13 times.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from pss_param.edges import init
from pss_param.options import RepairOptions, pick_device
from pss_param.plan import Plan, TensorSource, make_plan
from pss_param.reference import HealthySource
from pss_param.room import DEEP
from pss_param.spectrum import frobenius_norm, spectral_norm
from pss_param.surgery import parts_of
from pss_param.targets import Target

GROWN = 2.0
"""From this median growth on a repair is deep."""

FLAT, FLAT_GROWN = 0.6, 6.0
"""Where the median stable rank is at least so much of a fresh matrix's, and nothing tells how weights were drawn, the
growth from which on a repair is deep: Note [Grown, or drawn larger]."""


@dataclass(frozen=True)
class Growth:
    r"""How far the matrices have outgrown fresh ones, and what a repair makes of that.

    Args:
        times: median over the measured matrices, dimensionless.
        seen: the same as a clause; empty where nothing could be measured.
        limit: from which growth on a repair is deep.
        flatness: median stable rank over that of fresh ones; 0 where it is known how the weights were drawn.
    """

    times: float
    seen: str
    limit: float = GROWN
    flatness: float = 0.0

    @property
    def strength(self) -> str:
        r"""What a repair would be."""
        return "deep" if self.times >= self.limit else "gentle"

    @property
    def reason(self) -> str:
        r"""The strength with its reason and the other one; empty where nothing could be measured."""
        if self.strength == "deep":
            return f"deep: {self.seen}; healthy ones may, after very long training: then strength gentle keeps more"
        flat = ", flat as they are" if self.limit > GROWN else ""
        return f"gentle: {self.seen}; from {self.limit:g} x on it would be deep{flat}" if self.seen else ""


_SAMPLE = 16  # tensors, evenly over the depth: a median of so many does not hang on one of them


def settle(source: TensorSource, options: RepairOptions) -> tuple[RepairOptions, str]:
    r"""Choose between a gentle and a deep repair, where the options leave it open.

    .. math:: \operatorname{median}_i \, \lVert W_i \rVert_2 / \lVert W_i^\mathrm{fresh} \rVert_2 \ge 2
        \iff \text{deep}, \qquad
        \lVert W^\mathrm{fresh} \rVert_2 = \text{std} \, (\sqrt m + \sqrt n)

    over 16 targets inside the blocks, evenly over the depth; of kernels before a batch norm over three times that. 6
    stands in the place of 2 where the matrices are as flat as fresh ones and nobody said how those were drawn. See
    Note [Why growth decides] and Note [Grown, or drawn larger].

    Args:
        source: the tensors.
        options: what to do.

    Returns:
        The options with a strength, and one clause of why; empty where there was nothing to choose.

    Example:
        >>> from pss_param.plan import StateDictSource
        >>> grown = {"layers.0.mlp.up_proj.weight": 9 * torch.eye(64)}
        >>> chosen, reason = settle(StateDictSource(grown), RepairOptions())
        >>> chosen.strength, reason.split(";")[0]
        ('deep', 'deep: the matrices inside the blocks have 7.8 x the spectral norm of fresh ones (median of 1)')
    """
    if options.strength != "auto":
        return options, ""
    if not options.open:
        return replace(options, strength="gentle"), ""
    growth = measure_growth(source, options)
    if growth.strength == "deep":
        return replace(options, strength="deep"), growth.reason
    return replace(options, strength="gentle", init_std=None), growth.reason


def measure_growth(source: TensorSource, options: RepairOptions) -> Growth:
    r"""Measure what :func:`settle` chooses by.

    Args:
        source: the tensors.
        options: which matrices, and against what.

    Returns:
        The growth.

    Example:
        >>> from pss_param.plan import StateDictSource
        >>> measure_growth(StateDictSource({"layers.0.mlp.up_proj.weight": torch.zeros(4, 4)}), RepairOptions()).times
        0.0
    """
    with HealthySource(options.reference, source.tensors) as healthy:
        plan = make_plan(source, options.rules())
        measures = list(_measures(source, plan, options, healthy))
        whose = "those of the reference" if healthy.present else f"fresh ones{_and_of_kernels(plan)}"
    if not measures:
        return Growth(0.0, "")
    times = median(one.growth for one in measures)
    seen = f"{_which(plan)} have {times:.1f} x the spectral norm of {whose} (median of {len(measures)})"
    flatness = median(one.flatness for one in measures)
    return Growth(times, seen, FLAT_GROWN if flatness >= FLAT else GROWN, flatness)


def _which(plan: Plan) -> str:
    blocks = any(target.block is not None for target in plan.targets.values())
    return "the matrices inside the blocks" if blocks else "the matrices"


def _grows(target: Target, plan: Plan) -> bool:
    return target.role == "conv" and plan.special.get(target.name) == "roomy"


def _and_of_kernels(plan: Plan) -> str:
    grow = any(_grows(target, plan) for target in plan.targets.values())
    return f", or of {DEEP:g} times that before a batch norm" if grow else ""


class _Measure(NamedTuple):
    growth: float
    flatness: float  # stable rank over a fresh one's; 0 where it is known how the weight was drawn


def _measures(source: TensorSource, plan: Plan, options: RepairOptions, healthy: HealthySource) -> Iterator[_Measure]:
    device = pick_device(options.device)
    for target in _sample(list(plan.targets.values())):
        weight = source.read(target.name).to(device).float()
        good = healthy.get(target.name, tuple(weight.shape)).to(device) if healthy.present else None
        if bool(torch.isfinite(weight).all()) and (good is None or bool(torch.isfinite(good).all())):
            allowed = DEEP if good is None and _grows(target, plan) else 1.0
            for one in _measures_of(target, weight, good, options.init_std or target.init_std):
                yield one._replace(growth=one.growth / allowed)


def _sample(targets: list[Target]) -> list[Target]:
    inside = [target for target in targets if target.block is not None] or targets
    count = min(_SAMPLE, len(inside))
    return [inside[(2 * i + 1) * len(inside) // (2 * count)] for i in range(count)]


def _measures_of(target: Target, weight: Tensor, good: Tensor | None, std: float | None) -> Iterator[_Measure]:
    for part in parts_of(target, weight, good):
        index = next(part.indices)  # of a batch such as experts, the first stands for all
        matrix = part.values[index]
        usual = init(matrix, std) if part.healthy is None else spectral_norm(part.healthy[index])
        if float(usual) > 0:
            norm, unknown = float(spectral_norm(matrix)), std is None and part.healthy is None
            yield _Measure(norm / float(usual), _flatness(matrix, norm) if unknown else 0.0)


def _flatness(matrix: Tensor, norm: float) -> float:
    m, n = matrix.shape
    return float(frobenius_norm(matrix[None])) ** 2 / norm**2 / (m * n / (m**0.5 + n**0.5) ** 2) if norm > 0 else 0.0
