"""Text from outside (file names, labels, log lines, reasons) as a terminal, a table or a page may show it."""

from __future__ import annotations

import re
import sys
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

# What turns the direction of the text around it, so that a name reads as another one (Unicode technical report 36).
_DIRECTION = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# What a spreadsheet takes for the beginning of a formula, in Latin and in full width.
_FORMULA = tuple("=+-@\t\r＝＋－＠")


def plain(text: object, lines: bool = False) -> str:
    """`text` without anything that a terminal obeys: control characters, escapes and directions are written out.

    A lone surrogate (a byte of a file name that is no UTF-8) is written out as well, so that the result can always be
    encoded.

    Args:
        lines: whether line breaks and tabs stay what they are.
    """
    return "".join(_shown(character, lines) for character in str(text))


def say(text: object, *, error: bool = False) -> None:
    """Print lines for a person, to standard output or standard error."""
    print(plain(text, lines=True), file=sys.stderr if error else sys.stdout, flush=True)


def cell(text: object, style: str = "") -> Text:
    """`text` in a table, a bar or a line of rich, which would read square brackets in a `str` as markup."""
    from rich.text import Text

    return Text(plain(text), style=style)


def markdown_text(text: object) -> str:
    """`text` in one line of Markdown, GitHub's included: nothing in it is emphasis, a link, a table's or HTML."""
    # An underscore within a word is one.
    escaped = re.sub(r"([\\`*\[\]<>|~&$]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", plain(text))
    # What means something at the beginning of a line alone: headings, rules, lists.
    return re.sub(r"^(\s*)([#+=-]+(?=\s|$))|^(\s*\d+)([.)](?=\s|$))", r"\1\3\\\2\4", escaped)


def spreadsheet_cell(value: object) -> object:
    """`value` in a CSV file that a spreadsheet may open: text is never a formula. Numbers stay numbers."""
    if not isinstance(value, str):
        return value
    return f"'{plain(value)}" if value.startswith(_FORMULA) else plain(value)


def _shown(character: str, lines: bool) -> str:
    if lines and character in "\n\t":
        return character
    if character in _DIRECTION or unicodedata.category(character) in ("Cc", "Cs"):
        return character.encode("unicode_escape", "surrogatepass").decode("ascii")
    return character
