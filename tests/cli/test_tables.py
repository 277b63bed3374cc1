# SPDX-License-Identifier: Apache-2.0
"""What a table gives up in a narrow terminal, and what it never does."""

import io

import pytest
from pss_param.cli.tables import Listing
from rich.console import Console

NAME = "layers.12.mlp.up_proj.weight"
HEADS = ("tensor", "role", "shape", "stable rank", "change", "note")


def shown(width, note="", terminal=True):
    rows = Listing(HEADS, ("stable rank", "change"), spare=("shape", "role"), aside="note")
    rows.add(NAME, "up", "4096x1024", "1.02 > 96.00", "40.0%", "")
    rows.add("[red]x[/]", "up", "4096x1024", "1.02 > 96.00", "40.0%", note)
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None, markup=False)
    console.print(rows)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("width", "heads"),
    [
        (120, ["tensor", "role", "shape", "stable rank", "change", "note"]),
        (72, ["tensor", "role", "shape", "stable rank", "change"]),
        (60, ["tensor", "role", "stable rank", "change"]),
        (50, ["tensor", "stable rank", "change"]),
        (36, ["tensor", "stable rank", "change"]),
    ],
)
def test_the_empty_goes_first_then_shape_then_role_and_only_then_names_fold(width, heads):
    lines = shown(width)
    assert [head for head in HEADS if head in lines[0]] == heads
    assert max(map(len, lines)) <= width
    assert any(line.startswith(NAME) for line in lines) == (width >= 50)
    assert any(line.startswith("[red]x[/]") for line in lines)


def test_a_remark_keeps_its_column_while_there_is_room_and_moves_below_the_name_where_there_is_none():
    remark = "all lies below the edge"
    assert "note" in shown(100, remark)[0]
    narrow = shown(50, remark)
    assert "note" not in narrow[0]
    assert narrow[-1] == f"  {remark}"
    assert any(line.startswith(NAME) for line in narrow)


def test_a_pipe_loses_no_column():
    assert all(head in shown(120, terminal=False)[0] for head in HEADS)
    narrow = shown(50, terminal=False)
    assert "role" in narrow[0]
    assert max(map(len, narrow)) <= 50
