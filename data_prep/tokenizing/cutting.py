"""Cutting an enormous text into parts whose ids, put together, are the ids of the whole.

Byte-pair tokenizers first split a text into words and never look across a word's edge; sentencepiece models trained as
usual do not look across white space. A single newline between two visible characters is such an edge for all of them,
and so is the place in front of a single space that a letter follows.
"""

from __future__ import annotations

PART = 1 << 20  # characters in a part, about
_FARTHEST = 4 * PART


def cut(text: str) -> tuple[list[str], int]:
    """Parts of `text`, and how often no edge was found within 4 million characters and the cut was made anyway.

    There, and only there, ids can differ from those of the whole text.
    """
    parts: list[str] = []
    forced = start = 0
    while len(text) - start > PART + PART // 2:
        farthest = min(start + _FARTHEST, len(text))
        at = _edge(text, start + PART // 2, start + PART, last=True) or _edge(text, start + PART, farthest)
        if not at:
            at = farthest
            forced += at < len(text)
        parts.append(text[start:at])
        start = at
    if start < len(text) or not parts:
        parts.append(text[start:])
    return parts, forced


def _edge(text: str, low: int, high: int, last: bool = False) -> int:
    """The first edge in `text[low:high]`, or the last: where to cut. Newlines go before spaces; 0 without an edge."""
    for mark in "\n ":
        at = high if last else low - 1
        while (at := text.rfind(mark, low, at) if last else text.find(mark, at + 1, high)) > 0:
            if _is_edge(text, at):
                return at + (mark == "\n")
    return 0


def _is_edge(text: str, at: int) -> bool:
    if not 0 < at < len(text) - 1 or text[at - 1].isspace():
        return False
    after = text[at + 1]
    return after.isalpha() if text[at] == " " else not after.isspace()
