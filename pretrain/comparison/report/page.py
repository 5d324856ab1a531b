"""The report as one HTML file: pictures and style inside, nothing fetched from anywhere."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from data_prep.plain_text import plain
from pretrain.comparison.report.document import Document
from pretrain.comparison.report.drawing import ARM_COLOURS


def page(document: Document) -> str:
    """The whole page as text."""
    environment = Environment(
        loader=PackageLoader("pretrain.comparison.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    swatches = {label: index % ARM_COLOURS + 1 for index, label in enumerate(document.labels)}
    return environment.get_template("page.html").render(document=document, swatches=swatches)


def _shown(value: Any) -> Any:
    """Plain text of what comes from outside; markup of the template itself stays."""
    return value if isinstance(value, Markup) else plain(value, lines=True)
