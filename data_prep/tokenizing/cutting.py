"""Cutting an enormous text into parts whose ids, put together, are the ids of the whole.

Byte-pair tokenizers first split a text into words and never look across a word's edge; sentencepiece models trained as
usual do not look across white space. A single newline between two visible characters is such an edge for all of them,
and so is the place in front of a single space that a letter follows.
"""

from __future__ import annotations

from collections.abc import Iterator

PART = 1 << 20  # characters in a part, about
_FARTHEST = 4 * PART


class Cutter:
    """Cuts a text that arrives in pieces; the cuts do not depend on how it arrives.

    forced: how often no edge was found within 4 million characters and the cut was made anyway. There, and only there,
    ids can differ from those of the whole text.
    """

    def __init__(self) -> None:
        self._text = ""
        self.forced = 0

    def feed(self, text: str) -> Iterator[str]:
        """Add text; yields the parts that are settled by it."""
        self._text += text
        while len(self._text) > _FARTHEST:
            yield self._take()

    def finish(self) -> Iterator[str]:
        """The parts of what is left."""
        while len(self._text) > PART + PART // 2:
            yield self._take()
        if self._text:
            yield self._text
        self._text = ""

    def _take(self) -> str:
        at = edge_before(self._text, PART // 2, PART) or _edge_after(self._text, PART, _FARTHEST)
        if not at:
            at = min(len(self._text), _FARTHEST)
            self.forced += at < len(self._text)
        part, self._text = self._text[:at], self._text[at:]
        return part


def cut(text: str) -> tuple[list[str], int]:
    """Parts of `text` and how many cuts were forced."""
    if len(text) <= PART + PART // 2:
        return [text], 0
    cutter = Cutter()
    parts = [*cutter.feed(text), *cutter.finish()]
    return parts, cutter.forced


def edge_before(text: str, low: int, high: int) -> int:
    """The last edge in `text[low:high]` (a cut goes in front of it), a newline's before a space's; 0 without one."""
    for mark in "\n ":
        at = high
        while (at := text.rfind(mark, low, at)) > 0:
            if _is_edge(text, at):
                return at + (mark == "\n")
    return 0


def _edge_after(text: str, low: int, high: int) -> int:
    for mark in "\n ":
        at = low - 1
        while (at := text.find(mark, at + 1, high)) > 0:
            if _is_edge(text, at):
                return at + (mark == "\n")
    return 0


def _is_edge(text: str, at: int) -> bool:
    if not 0 < at < len(text) - 1 or text[at - 1].isspace():
        return False
    after = text[at + 1]
    return after.isalpha() if text[at] == " " else not after.isspace()
