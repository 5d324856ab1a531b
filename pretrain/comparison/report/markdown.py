"""The report as markdown: the same sentences and tables, pictures in words."""

from __future__ import annotations

from pretrain.comparison.report.document import Document, Section
from pretrain.comparison.report.pictures import Picture
from pretrain.comparison.report.tables import Table


def markdown(document: Document) -> str:
    """The whole report as text."""
    parts = [f"# {document.title}", document.subtitle]
    if document.description:
        parts.append(document.description)
    if document.problems:
        parts.append(
            "**Incomplete.** What follows is about the arms that finished.\n\n"
            + "\n".join(f"- {p}" for p in document.problems)
        )
    parts += document.findings
    for section in document.sections:
        parts += _section(section)
    return "\n\n".join([*parts, "---", document.footer]) + "\n"


def _section(section: Section) -> list[str]:
    parts = [f"## {section.title}", *section.paragraphs]
    for block in section.blocks:
        if isinstance(block, Picture):
            parts.append(f"*{block.title}* (drawn in index.html): {block.alternative}.")
        elif isinstance(block, Table):
            parts.append(_table(block))
        elif isinstance(block, dict):
            parts.append("\n".join(f"- {key}: {value}" for key, value in block.items()))
        else:
            parts.append(f"```\n{block}\n```")
    return parts


def _table(table: Table) -> str:
    head = [f"{column.head} ({column.unit})" if column.unit else column.head for column in table.columns]
    rules = [":---" if column.text else "---:" for column in table.columns]
    rows = [
        [f"**{cell}**" if (row_number, number) in table.best else cell for number, cell in enumerate(row)]
        for row_number, row in enumerate(table.rows)
    ]
    lines = [_row(head), _row(rules), *(_row(row) for row in rows)]
    return "\n\n".join([f"**{table.title}**", "\n".join(lines), *([table.note] if table.note else [])])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
