"""The report as one HTML file: pictures and style inside, nothing fetched from anywhere."""

from __future__ import annotations

import html
from importlib import resources

from data_prep.plain_text import plain
from pretrain.comparison.report.document import Document, Section
from pretrain.comparison.report.drawing import ARM_COLOURS, Picture
from pretrain.comparison.report.tables import Column, Table

_LONG = 40  # characters beyond which a cell may break into lines


def page(document: Document) -> str:
    """The whole page as text."""
    style = resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    swatches = {label: index % ARM_COLOURS + 1 for index, label in enumerate(document.labels)}
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(document.title)}</title>",
        f"<style>\n{style}</style>",
        "</head>",
        "<body>",
        "<main>",
        "<header>",
        f"<h1>{escape(document.title)}</h1>",
        f'<p class="meta">{escape(document.subtitle)}</p>',
        f'<p class="lead">{escape(document.description)}</p>' if document.description else "",
        "</header>",
        _problems(document.problems),
        '<section class="findings" aria-label="What was measured">',
        *(f"<p>{escape(sentence)}</p>" for sentence in document.findings),
        "</section>",
        *(_section(section, swatches) for section in document.sections),
        f"<footer>{escape(document.footer)}</footer>",
        "</main>",
        "</body>",
        "</html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _problems(problems: list[str]) -> str:
    if not problems:
        return ""
    items = "".join(f"<p>{escape(problem)}</p>" for problem in problems)
    lead = "<p><b>Incomplete.</b> What follows is about the arms that finished.</p>"
    return f'<section class="problems" aria-label="Incomplete">{lead}{items}</section>'


def _section(section: Section, swatches: dict[str, int]) -> str:
    parts = [f"<section><h2>{escape(section.title)}</h2>"]
    parts += [f"<p>{escape(paragraph)}</p>" for paragraph in section.paragraphs]
    for block in section.blocks:
        if isinstance(block, Picture):
            parts.append(_figure(block))
        elif isinstance(block, Table):
            parts.append(_table(block, swatches))
        elif isinstance(block, dict):
            items = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in block.items())
            parts.append(f"<dl>{items}</dl>")
        else:
            parts.append(f"<pre><code>{escape(block)}</code></pre>")
    return "\n".join([*parts, "</section>"])


def _figure(picture: Picture) -> str:
    label = escape(f"{picture.title}. {picture.alternative}")
    drawings = "".join(
        f'<div class="{width}" role="img" aria-label="{label}">{drawing}</div>'
        for width, drawing in (("wide", picture.wide), ("narrow", picture.narrow))
    )
    return (
        f"<figure>{drawings}<figcaption><b>{escape(picture.title)}.</b> {escape(picture.caption)}</figcaption></figure>"
    )


def _table(table: Table, swatches: dict[str, int]) -> str:
    head = "".join(_heading(column, swatches) for column in table.columns)
    body = []
    for row_number, row in enumerate(table.rows):
        cells = [f'<th scope="row" class="text">{_arm(row[0], swatches)}</th>']
        for number, cell in enumerate(row[1:], 1):
            names = " ".join(
                name
                for name, wanted in (
                    ("text", table.columns[number].text),
                    ("best", (row_number, number) in table.best),
                    ("long", len(cell) > _LONG),
                )
                if wanted
            )
            classes = f' class="{names}"' if names else ""
            cells.append(f"<td{classes}>{escape(cell)}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    title = escape(table.title)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{title}">'
        f"<table><caption><b>{title}.</b></caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>{note}"
    )


def _heading(column: Column, swatches: dict[str, int]) -> str:
    unit = f"<span>{escape(column.unit)}</span>" if column.unit else ""
    names = " ".join(name for name, wanted in (("text", column.text), ("arm", column.head in swatches)) if wanted)
    classes = f' class="{names}"' if names else ""
    return f'<th scope="col"{classes}>{_arm(column.head, swatches)}{unit}</th>'


def escape(text: str) -> str:
    """`text` in an element or an attribute."""
    return html.escape(plain(text, lines=True))


def _arm(text: str, swatches: dict[str, int]) -> str:
    number = swatches.get(text)
    swatch = f'<i class="swatch" style="background: var(--arm-{number})"></i>' if number else ""
    return f"{swatch}{escape(text)}"
