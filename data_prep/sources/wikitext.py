"""Where a page of WikiText begins; the same rule for corpora and for the evaluation set."""

from __future__ import annotations


def begins_page(line: str) -> bool:
    """Whether `line` is the title of a page, such as ` = Robert Boulter = `; sections have two `=` or more.

    The rule is that of lm-evaluation-harness (`wikitext_document_level`), so that a page is an item of its task: with
    `= = =` and `= =` drawn together, the line begins with `= ` and ends with ` =`. The test split has 62 pages by it.
    """
    heading = line.replace("= = =", "===").replace("= =", "==").strip()
    return heading.startswith("= ") and heading.endswith(" =")
