"""Plain text: one document a file, documents between separators, or WikiText's pages."""

from __future__ import annotations

import codecs
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from data_prep.sources.base import (
    LARGE,
    Filtered,
    Group,
    Item,
    LargeDocument,
    PieceReader,
    ReadOptions,
    Reject,
    SourceError,
    accept,
)
from data_prep.sources.lines import LineReader, LongLine
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
                self._lines = LineReader(path, self.scratch, self.options.separator.encode())
            start, end = (0, None) if self.group.pieces == 1 else (piece * size, (piece + 1) * size)
            yield from self._separated(self._lines, start, end)
            self.end_seen = self._lines.at_end
            return
        for path in self.group.files:
            self.file, self.lines = path, 0
            try:
                reader = LineReader(path, self.scratch, self.options.separator.encode())
                yield from self._separated(reader, 0, None)
                reader.stream.close()
            except SourceError as error:  # the other files are whole
                yield Reject(error.reason, self.lines, str(error))
        self.end_seen = True

    def _separated(self, reader: LineReader, start: int, end: int | None) -> Iterator[Item]:
        for line in reader.lines(start, end):
            self.lines += 1
            if isinstance(line, LongLine):
                yield large_text(line.path, self.lines, self.options, temporary=True)
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
                data = _read_up_to(stream, LARGE)
                if len(data) <= LARGE:
                    yield text_item(data, 1, self.options)
                else:
                    yield self._spooled(stream, data)
                stream.close()
            except SourceError as error:
                yield Reject(error.reason, 1, str(error))
        self.end_seen = True

    def _spooled(self, stream: ByteStream, data: bytes) -> Item:
        descriptor, name = tempfile.mkstemp(prefix="text-", dir=self.scratch)
        try:
            with os.fdopen(descriptor, "wb") as target:
                while data:
                    target.write(data)
                    data = stream.read()
            return large_text(Path(name), 1, self.options, temporary=True)
        except BaseException:  # a full disk must not stay full
            Path(name).unlink(missing_ok=True)
            raise


class WikitextReader(PieceReader):
    """WikiText: a page is a document, from its heading to the next page's."""

    def items(self, piece: int) -> Iterator[Item]:
        for path in self.group.files:
            self.file, self.lines = path, 0
            try:
                reader = LineReader(path, self.scratch)
                yield from self._pages(reader)
                reader.stream.close()
            except SourceError as error:  # other files of the group are whole
                yield Reject(error.reason, self.lines, str(error))
        self.end_seen = True

    def _pages(self, reader: LineReader) -> Iterator[Item]:
        page: list[bytes] = []
        first = 1
        for line in reader.lines(0, None):
            self.lines += 1
            if isinstance(line, LongLine):
                line.path.unlink()
                yield Reject("too_long", self.lines, f"a line of {line.bytes} bytes in a WikiText file")
                continue
            if PAGE.match(line) and any(before.strip() for before in page):
                yield text_item(b"\n".join(page) + b"\n", first, self.options)
                page, first = [], self.lines
            page.append(line)
        if any(line.strip() for line in page):
            yield text_item(b"\n".join(page) + b"\n", first, self.options)


def text_item(data: bytes, line: int, options: ReadOptions) -> Item:
    """A document out of raw bytes, or why it is none."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return Reject("invalid_utf8", line, f"byte {error.start} of the document: {error.reason}")
    return accept(text, None, None, line, options)


def large_text(path: Path, line: int, options: ReadOptions, temporary: bool) -> Item:
    """The document that is the whole of `path`, checked piece by piece."""
    size = path.stat().st_size
    problem = ""
    if size > options.maximum_document_bytes:
        problem = "too_long"
    else:
        problem = _scan_utf8(path)
    if problem:
        if temporary:
            path.unlink()
        return Reject(problem, line, f"a document of {size} bytes")
    return LargeDocument(path, 0, size, line, None, temporary)


def _scan_utf8(path: Path) -> str:
    decoder = codecs.getincrementaldecoder("utf-8")()
    blank = True
    with path.open("rb") as stream:
        while True:
            chunk = stream.read(1 << 20)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError:
                return "invalid_utf8"
            if not chunk:
                return "empty_document" if blank else ""
            if b"\x00" in chunk:
                return "nul_byte"
            blank = blank and chunk.isspace()


def _read_up_to(stream: ByteStream, limit: int) -> bytes:
    """The stream's bytes as long as they are at most `limit`; a little more than that where there are more."""
    parts: list[bytes] = []
    size = 0
    while size <= limit and (chunk := stream.read()):
        parts.append(chunk)
        size += len(chunk)
    return b"".join(parts)
