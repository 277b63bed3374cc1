# SPDX-License-Identifier: Apache-2.0
r"""Options that several commands share, each written once."""

from collections.abc import Callable
from typing import Any, TypeVar

import click
import torch

from pss_param.edges import EDGES
from pss_param.options import WORDS, RepairOptions
from pss_param.shapes import SHAPES
from pss_param.smoothing import WHOLE_MATRIX_SHAPES
from pss_param.targets import PRESETS

_F = TypeVar("_F", bound=Callable[..., Any])

checkpoint = click.argument("ckpt", type=click.Path())

as_json = click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout.")
output = click.option("-o", "--output", type=click.Path(), help="Where to write. [default: beside CKPT]")
force = click.option("--force", is_flag=True, help="Replace an existing output.")


def _set_threads(ctx: click.Context, parameter: click.Parameter, value: int | None) -> None:
    if value is not None:
        before = torch.get_num_threads()
        ctx.call_on_close(lambda: torch.set_num_threads(before))  # a caller of `run` gets its own setting back
        torch.set_num_threads(value)


_SELECTION = (
    click.option(
        "--targets", type=click.Choice(sorted(PRESETS)), default="linear", show_default=True,
        help="Which weights: linear is every matrix inside the blocks.",
    ),
    click.option(
        "--include", multiple=True, metavar="PATTERN",
        help="Take matching names too, 3-D ones as batches of matrices; repeatable.",
    ),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave these alone; repeatable."),
    click.option("--per-head", is_flag=True, help="Treat each attention head as a matrix of its own."),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ..."),
    click.option(
        "--threads", type=click.IntRange(min=1), callback=_set_threads, expose_value=False,
        help="CPU threads; 1 is often fastest on a busy machine. [default: torch decides]",
    ),
)  # fmt: skip

_SMOOTHING = (
    click.option(
        "--strength", type=click.Choice(WORDS["strength"]), default=RepairOptions.strength, show_default=True,
        help="gentle: what stands out in the blocks' matrices; deep: all matrices, norms and biases; "
        "auto: by how far the matrices have outgrown fresh ones.",
    ),
    click.option(
        "--smoothing", type=click.Choice([*SHAPES, *WHOLE_MATRIX_SHAPES]),
        help="How dominant singular values come down. [default: clip; equal if deep, to the edge init]",
    ),
    click.option(
        "--edge", type=click.Choice(list(EDGES)), help="The level they come down to. [default: bulk; init if deep]",
    ),
    click.option("--rank", type=click.IntRange(min=1), help="How many, for --edge dominant."),
    click.option(
        "--init-std", type=click.FloatRange(min=0, min_open=True),
        help="Standard deviation of a fresh weight, for --edge init.",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Of the random start."),
)  # fmt: skip


reference = click.option(
    "--reference", type=click.Path(), metavar="GOOD", help="A healthy checkpoint of the model, any format: show drift."
)

_HEALTHY = (
    reference,
    click.option(
        "--nonfinite", type=click.Choice(WORDS["nonfinite"]), default="refuse", show_default=True,
        help="Tensors with NaN or infinity: refuse, or take them from GOOD.",
    ),
    click.option(
        "--where", type=click.Choice(WORDS["where"]), default="all", show_default=True,
        help="Repair all targets, or those whose stable rank fell against GOOD.",
    ),
    click.option(
        "--drifted-below", type=click.FloatRange(0, 1, min_open=True), default=0.5, show_default=True,
        metavar="FRACTION", help="Of GOOD's stable rank, for --where drifted.",
    ),
    click.option(
        "--optimizer", type=click.Choice(WORDS["optimizer"]), default="auto", show_default=True,
        help="Moments: keep, reset those of repaired parameters, reset all, or (auto) reset all in a deep repair.",
    ),
    click.option(
        "--param-order", type=click.Path(), metavar="FILE",
        help="From pss_param.write_param_order, where the state numbers its parameters.",
    ),
    click.option(
        "--verify/--no-verify", default=True, show_default=True, help="Read the copy again before it gets its name.",
    ),
)  # fmt: skip


def recovery(function: _F) -> _F:
    r"""Add the options about a healthy checkpoint, the optimizer's state and the check of the copy.

    Args:
        function: a command's function.

    Returns:
        The same function.
    """
    return _stacked(_HEALTHY, function)


def selection(function: _F) -> _F:
    r"""Add the options that choose tensors and the machine's resources.

    Args:
        function: a command's function.

    Returns:
        The same function.
    """
    return _stacked(_SELECTION, function)


def smoothing(function: _F) -> _F:
    r"""Add the options that say what is done to a tensor.

    Args:
        function: a command's function.

    Returns:
        The same function.
    """
    return _stacked(_SMOOTHING, function)


def _stacked(options: tuple[Callable[[_F], _F], ...], function: _F) -> _F:
    for option in reversed(options):
        function = option(function)
    return function
