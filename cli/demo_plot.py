# SPDX-License-Identifier: Apache-2.0
r"""Curves as text: one letter per curve, so that it reads without colour, in a pipe and in any encoding."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text


@dataclass(frozen=True)
class Curve:
    r"""One curve of a plot.

    Args:
        values: its heights, evenly spaced.
        mark: the character it is drawn with.
        style: of the character.
        left: where it begins, as a share of the width.
        right: where it ends.
    """

    values: Sequence[float]
    mark: str
    style: str
    left: float = 0.0
    right: float = 1.0

    def columns(self, width: int) -> dict[int, float]:
        r"""Average the values that share a column.

        Args:
            width: columns of the whole plot.

        Returns:
            Heights by column.
        """
        first, last = round(self.left * width), round(self.right * width)
        count, total = max(1, last - first), len(self.values)
        heights = {}
        for i in range(count):
            start = i * total // count
            piece = self.values[start : max(start + 1, (i + 1) * total // count)]
            heights[first + i] = math.fsum(piece) / len(piece)
        return heights


def draw(curves: Sequence[Curve], limits: tuple[float, float], size: tuple[int, int], level: float) -> Text:
    r"""Draw curves over one another; later ones lie on top.

    Args:
        curves: what to draw.
        limits: lowest and highest value; what lies outside, or is NaN, is drawn at the rim.
        size: columns (with the axis) and rows.
        level: height of a dotted line.

    Returns:
        One line per row.
    """
    (low, high), (columns, rows) = limits, size
    width = columns - 6

    def row(value: float) -> int:
        share = (value - low) / (high - low)
        return rows - 1 - round(min(max(share if share == share else 1.0, 0.0), 1.0) * (rows - 1))

    cells = {(row(level), column): (".", "dim") for column in range(width)}
    for curve in curves:
        cells |= {(row(h), x): (curve.mark, curve.style) for x, h in curve.columns(width).items()}
    lines = []
    for r in range(rows):
        label = f"{high - (high - low) * r / (rows - 1):4.1f} |"
        lines.append(Text.assemble(label, *(cells.get((r, x), " ") for x in range(width))))
    return Text("\n").join(lines)
