"""Text from outside, as terminals, tables, Markdown and spreadsheets show it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from data_prep.plain_text import cell, markdown_text, spreadsheet_cell


def test_square_brackets_in_a_table_are_text() -> None:
    table = Table()
    table.add_column(cell("[bold]head[/bold]"))
    for text in ("[/red]", "[/path]", "[link=x]y[/link]", "\x1b[31mred"):
        table.add_row(cell(text))
    stream = io.StringIO()
    Console(file=stream, width=80, force_terminal=True).print(table)
    assert "[bold]head[/bold]" in stream.getvalue()
    for text in ("[/red]", "[/path]", "[link=x]y[/link]", r"\x1b[31mred"):
        assert text in stream.getvalue()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a|b", r"a\|b"),
        ("*x* _y_ `z` ~w~ $v$", r"\*x\* \_y\_ \`z\` \~w\~ \$v\$"),
        ("[text](javascript:x)", r"\[text\](javascript:x)"),
        ("<script>", r"\<script\>"),
        ("MOR_SHARED_DATA __x__", r"MOR_SHARED_DATA \_\_x\_\_"),
        ("# head", r"\# head"),
        ("- item", r"\- item"),
        ("---", r"\---"),
        ("12. item", r"12\. item"),
        ("+0.040 (0.5 nats)", "+0.040 (0.5 nats)"),
        ("12.5 M", "12.5 M"),
    ],
)
def test_markdown_is_text(given: str, expected: str) -> None:
    assert markdown_text(given) == expected
    assert "\n" not in markdown_text(f"{given}\n{given}")


def test_a_spreadsheets_cell_is_no_formula() -> None:
    for text in ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "＝1"):
        assert str(spreadsheet_cell(text)).startswith("'")
    assert spreadsheet_cell(-1.5) == -1.5 and spreadsheet_cell("a=1") == "a=1" and spreadsheet_cell("") == ""
