"""Text from outside (file names, labels, log lines, reasons), made safe for terminals, tables and pages."""

from __future__ import annotations

import re
import sys
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

# These change the direction of the text around them, so that a name reads as another (Unicode technical report 36).
_DIRECTION = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# A spreadsheet takes text that begins so for a formula; Latin and full width.
_FORMULA = tuple("=+-@\t\r＝＋－＠")


def plain(text: object, lines: bool = False) -> str:
    """`text` with control characters, escapes and changes of direction written out, so that a terminal obeys none.

    A lone surrogate (a byte of a file name that is not UTF-8) is written out too, so the result can always be encoded.

    Args:
        lines: whether line breaks and tabs stay.
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
    # Markup at the beginning of a line only: headings, rules, lists.
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
