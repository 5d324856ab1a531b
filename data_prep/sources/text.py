"""Plain text: one document a file, documents between separators, or WikiText's pages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from data_prep.sources.base import Filtered, Group, Item, PieceReader, ReadOptions, Reject, SourceError
from data_prep.sources.lines import LineReader, LongLine
from data_prep.sources.spool import Spool, text_item
from data_prep.sources.streams import ByteStream

PAGE = re.compile(rb"^ = [^=](?:.*[^=])? = \s*$")  # WikiText: a heading of the first level begins a page


class TextReader(PieceReader):
    """One document a file; with a separator, one document between two of them."""

    def __init__(self, group: Group, options: ReadOptions, scratch: Path) -> None:
        super().__init__(group, options, scratch)
        self._lines: LineReader | None = None

    def items(self, piece: int) -> Iterator[Item]:
        if not self.options.separator:
            yield from self._one_each()
            return
        if len(self.group.files) == 1:
            size, path = self.group.piece_bytes, self.group.files[0]
            self.file, self.lines = path, 0
            if self._lines is None:
                self._lines = LineReader(path, self.options.separator.encode())
            start, end = (0, None) if self.group.pieces == 1 else (piece * size, (piece + 1) * size)
            yield from self._separated(self._lines, start, end)
            self.end_seen = self._lines.at_end
            return
        for path in self.group.files:
            self.file, self.lines = path, 0
            try:
                reader = LineReader(path, self.options.separator.encode())
                yield from self._separated(reader, 0, None)
                reader.stream.close()
            except SourceError as error:  # the other files are whole
                yield Reject(error.reason, self.lines, str(error))
        self.end_seen = True

    def _separated(self, reader: LineReader, start: int, end: int | None) -> Iterator[Item]:
        for line in reader.lines(start, end):
            self.lines += 1
            if isinstance(line, LongLine):
                with Spool(self.options, self.scratch) as spool:
                    while part := line.read():
                        spool.write(part)
                    found = spool.item(self.lines)
                yield found
            elif not line.strip():
                yield Filtered("blank_line")
            else:
                yield text_item(line, self.lines, self.options)

    def close(self) -> None:
        if self._lines is not None:
            self._lines.stream.close()

    def _one_each(self) -> Iterator[Item]:
        for path in self.group.files:
            self.file, self.lines = path, 1
            try:
                stream = ByteStream(path)
                with Spool(self.options, self.scratch) as spool:
                    while not spool.hopeless and (part := stream.read()):
                        spool.write(part)
                    found = spool.item(1)
                stream.close()
                yield found
            except SourceError as error:
                yield Reject(error.reason, 1, str(error))
        self.end_seen = True


class WikitextReader(PieceReader):
    """WikiText: a page is a document, from its heading to the next page's."""

    def items(self, piece: int) -> Iterator[Item]:
        for path in self.group.files:
            self.file, self.lines = path, 0
            try:
                reader = LineReader(path)
                yield from self._pages(reader)
                reader.stream.close()
            except SourceError as error:  # other files of the group are whole
                yield Reject(error.reason, self.lines, str(error))
        self.end_seen = True

    def _pages(self, reader: LineReader) -> Iterator[Item]:
        pages = Pages(self.options, self.scratch)
        try:
            for line in reader.lines(0, None):
                self.lines += 1
                yield from pages.begin_line(line if isinstance(line, bytes) else b"", self.lines)
                if isinstance(line, LongLine):
                    while part := line.read():
                        pages.write(part)
                else:
                    pages.write(line)
                pages.write(b"\n")
            yield from pages.finish()
        finally:
            pages.close()


class Pages:
    """Puts lines of WikiText together to pages: a heading of the first level begins one, if there was any text."""

    def __init__(self, options: ReadOptions, scratch: Path) -> None:
        self._options, self._scratch = options, scratch
        self._spool = Spool(options, scratch)
        self._first = 1
        self._blank = True  # nothing but white space so far

    def begin_line(self, line: bytes, number: int) -> Iterator[Item]:
        """The page in front of `line`, where that begins another; lines too long for memory are no headings."""
        if not self._blank and PAGE.match(line):
            yield from self.finish()
            self._first = number

    def write(self, data: bytes) -> None:
        """Add to the page."""
        self._spool.write(data)
        self._blank = self._blank and not data.strip()

    def finish(self) -> Iterator[Item]:
        """The page under way, if it has any text."""
        if not self._blank:
            found = self._spool.item(self._first)
            self._spool.discard()
            self._spool = Spool(self._options, self._scratch)
            self._blank = True
            yield found

    def close(self) -> None:
        """Let go of a page that was not finished."""
        self._spool.discard()
