"""Text from outside (file names, labels, log lines, reasons) as a terminal, a table or a page may show it."""

from __future__ import annotations

import unicodedata

# What turns the direction of the text around it, so that a name reads as another one (Unicode technical report 36).
_DIRECTION = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def plain(text: object, lines: bool = False) -> str:
    """`text` without anything that a terminal obeys: control characters, escapes and directions are written out.

    A lone surrogate (a byte of a file name that is no UTF-8) is written out as well, so that the result can always be
    encoded.

    Args:
        lines: whether line breaks and tabs stay what they are.
    """
    return "".join(_shown(character, lines) for character in str(text))


def _shown(character: str, lines: bool) -> str:
    if lines and character in "\n\t":
        return character
    if character in _DIRECTION or unicodedata.category(character) in ("Cc", "Cs"):
        return character.encode("unicode_escape", "surrogatepass").decode("ascii")
    return character
