"""The report as markdown: the same sentences and tables, pictures in words."""

from __future__ import annotations

import re

from data_prep.plain_text import markdown_text, plain
from pretrain.comparison.report.document import Document, Section
from pretrain.comparison.report.drawing import Picture
from pretrain.comparison.report.tables import Table


def markdown(document: Document) -> str:
    """The whole report as text."""
    parts = [f"# {markdown_text(document.title)}", markdown_text(document.subtitle)]
    if document.description:
        parts.append("\n".join(markdown_text(line) for line in document.description.splitlines()))
    if document.problems:
        parts.append(
            "**Incomplete.** What follows is about the arms that finished.\n\n"
            + "\n".join(f"- {markdown_text(p)}" for p in document.problems)
        )
    parts += [markdown_text(sentence) for sentence in document.findings]
    for section in document.sections:
        parts += _section(section)
    return "\n\n".join([*parts, "---", markdown_text(document.footer)]) + "\n"


def _section(section: Section) -> list[str]:
    parts = [f"## {section.title}"]
    for block in section.blocks:
        if isinstance(block, Picture):
            parts.append(f"*{block.title}* (drawn in index.html): {markdown_text(block.alternative)}.")
        elif isinstance(block, Table):
            parts.append(_table(block))
        elif isinstance(block, dict):
            parts.append("\n".join(f"- {key}: {markdown_text(value)}" for key, value in block.items()))
        else:
            text = plain(block, lines=True)
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            parts.append(f"{fence}\n{text}\n{fence}")
    return parts


def _table(table: Table) -> str:
    head = [markdown_text(f"{column.head} ({column.unit})" if column.unit else column.head) for column in table.columns]
    rules = [":---" if column.text else "---:" for column in table.columns]
    rows = [
        [
            f"**{cell}**" if (row_number, number) in table.best else cell
            for number, cell in enumerate(map(markdown_text, row))
        ]
        for row_number, row in enumerate(table.rows)
    ]
    lines = [f"| {' | '.join(row)} |" for row in (head, rules, *rows)]
    return "\n\n".join(
        [f"**{markdown_text(table.title)}**", "\n".join(lines), *([markdown_text(table.note)] if table.note else [])]
    )
