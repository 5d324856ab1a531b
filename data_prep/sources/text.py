"""Plain text: one document a file, documents between separators, or WikiText's pages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from data_prep.sources.base import MAXIMUM, Filtered, Item, ReadOptions, Reject, accept, too_long
from data_prep.sources.lines import LinePieceReader, LongLine
from data_prep.sources.streams import ByteStream
from data_prep.sources.wikitext import begins_page


class TextReader(LinePieceReader):
    """One document a file; with a separator, one document between two of them."""

    def read(self, path: str, piece: int) -> Iterator[Item]:
        if not self.options.separator:
            self.lines = 1
            with closing(ByteStream(path)) as stream:
                yield _text_item(stream.head(MAXIMUM + 1), 1, self.options)
            return
        for line in self.lines_of(path, piece, self.options.separator.encode()):
            if isinstance(line, LongLine):
                yield too_long(self.lines)
            elif not line.strip():
                yield Filtered("blank_line")
            else:
                yield _text_item(line, self.lines, self.options)


class WikitextReader(LinePieceReader):
    """WikiText: a page is a document, from its title to the next page's."""

    def read(self, path: str, piece: int) -> Iterator[Item]:
        pages = Pages(self.options)
        for line in self.lines_of(path, piece):
            yield from pages.add(line if isinstance(line, LongLine) else line + b"\n", self.lines)
        yield from pages.finish()


class Pages:
    """Puts lines of WikiText together to pages: a title begins one, if there was any text."""

    def __init__(self, options: ReadOptions) -> None:
        self._options = options
        self._data = bytearray()
        self._size = 0  # bytes of the page, which is not kept above MAXIMUM
        self._first = 1
        self._blank = True  # nothing but white space so far

    def add(self, line: bytes | LongLine, number: int) -> Iterator[Item]:
        """Add a line, with its end; yields the page in front of it where it begins another."""
        text = b"" if isinstance(line, LongLine) else line
        if not self._blank and begins_page(text.decode("utf-8", "replace")):
            yield from self.finish()
            self._first = number
        self._size += len(line)
        self._blank = self._blank and not text.strip() and self._size <= MAXIMUM
        if self._size > MAXIMUM:
            self._data.clear()
        else:
            self._data += text

    def finish(self) -> Iterator[Item]:
        """The page under way, if it has any text."""
        if not self._blank:
            too_large = self._size > MAXIMUM
            yield too_long(self._first) if too_large else _text_item(bytes(self._data), self._first, self._options)
            self._data, self._size, self._blank = bytearray(), 0, True


def _text_item(data: bytes, line: int, options: ReadOptions) -> Item:
    """A document out of raw bytes, or why it is none."""
    if len(data) > MAXIMUM:
        return too_long(line)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return Reject("invalid_utf8", line, f"byte {error.start} of the document: {error.reason}")
    return accept(text, None, None, line, options)
