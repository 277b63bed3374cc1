# SPDX-License-Identifier: Apache-2.0
r"""The table of two checkpoints beside each other."""

from collections.abc import Sequence

from pss_param.report import TensorDrift

from .console import stdout
from .tables import Listing


def show_drift(rows: Sequence[TensorDrift], fallen: float = 0.5) -> None:
    r"""Print one line per tensor: its matrix whose stable rank fell most.

    Args:
        rows: the tensors.
        fallen: fraction of the reference's stable rank below which a line is marked.
    """
    numbers = ("stable rank", "x", "spectral norm", "distance")
    lines = Listing(("tensor", "role", "shape", *numbers), numbers, spare=("shape", "role"))
    for row in rows:
        worst = row.worst
        several = f" (worst of {len(row.matrices)}: {worst.part})" if len(row.matrices) > 1 else ""
        cells = (
            row.name + several,
            row.role,
            "x".join(map(str, worst.shape)),
            "{:.2f} > {:.2f}".format(*worst.stable_rank),
            f"{worst.ratio:.2f}",
            "{:.3g} > {:.3g}".format(*worst.spectral_norm),
            f"{row.distance:.2%}",
        )
        lines.add(*cells, style="bold red" if worst.ratio < fallen else "")
    stdout().print(lines)
