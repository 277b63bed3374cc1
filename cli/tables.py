# SPDX-License-Identifier: Apache-2.0
r"""Tables that stay readable in a narrow terminal.

# Note [What gives way]
Rich shares a lack of room among all columns of text, which folds names to a few characters while an empty column keeps
its heading. What a reader can do without goes first: columns without any text, then those that the command has named,
in its order; remarks then move below the names. A pipe loses nothing, and ``--json`` has it all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

Row = tuple[tuple[str, ...], str]


@dataclass
class Listing:
    r"""Rows of plain texts under headings, in the style of all commands; any console prints it.

    Args:
        columns: headings; the first column holds names.
        numbers: headings of columns that are aligned to the right and never folded.
        spare: headings of columns that a narrow terminal does without, the first of them first.
        aside: heading of a column of remarks, which a narrow terminal shows below the names; or empty.
    """

    columns: Sequence[str]
    numbers: Sequence[str] = ()
    spare: Sequence[str] = ()
    aside: str = ""
    _rows: list[Row] = field(default_factory=list)

    def add(self, *cells: object, style: str = "") -> None:
        r"""Add a row.

        Args:
            *cells: shown by ``str``; never taken for markup.
            style: of the whole row.
        """
        self._rows.append((tuple(map(str, cells)), style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        r"""Lay the rows out. See Note [What gives way].

        Args:
            console: prints them.
            options: how wide it is.

        Yields:
            Table: as many columns as fit.
        """
        layouts = self._layouts() if console.is_terminal else iter([self._table(self.columns)])
        chosen = next(layouts)
        for narrower in layouts:
            if _natural_width(console, options, chosen) <= options.max_width:
                break
            chosen = narrower
        yield chosen

    def _layouts(self) -> Iterator[Table]:
        shown = list(self.columns)
        yield self._table(shown)
        empty = [name for at, name in enumerate(self.columns) if not any(cells[at] for cells, _ in self._rows)]
        for name in dict.fromkeys([*empty, *self.spare]):
            shown.remove(name)
            yield self._table(shown)
        if self.aside in shown:
            shown.remove(self.aside)
            yield self._table(shown, self.aside)

    def _table(self, shown: Sequence[str], below: str = "") -> Table:
        result = Table(box=None, pad_edge=False, header_style="bold")
        for name in shown:
            right = name in self.numbers
            result.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=right)
        for cells, style in self._rows:
            texts = dict(zip(self.columns, cells, strict=True))
            if texts.get(below):
                texts[self.columns[0]] += f"\n  {texts[below]}"
            result.add_row(*(Text(texts[name]) for name in shown), style=style)
        return result


def _natural_width(console: Console, options: ConsoleOptions, table: Table) -> int:
    unbounded = options.update(width=1 << 20)
    return table.__rich_measure__(console, unbounded).maximum
