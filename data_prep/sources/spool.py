"""The text of one document while it is read: in memory as long as it is small, then in a file, up to what is wanted."""

from __future__ import annotations

import codecs
import os
import tempfile
from pathlib import Path
from typing import IO

from data_prep.sources.base import LARGE, Document, Filtered, Item, LargeDocument, ReadOptions, Reject, accept


class Spool:
    """Takes the UTF-8 bytes of a document in parts; `item` is what comes of them.

    Nothing is kept of a document that is longer than the options allow, whatever its file is packed to, so that neither
    memory nor the disk is filled with it. As a context manager it removes the file, unless `item` has given it away.

    size: bytes taken so far.

    Args:
        scratch: folder for a text too large for memory.
    """

    def __init__(self, options: ReadOptions, scratch: Path) -> None:
        self.size = 0
        self._options, self._scratch = options, scratch
        self._limit = min(options.maximum_document_bytes, options.maximum_bytes or options.maximum_document_bytes)
        self._data = bytearray()
        self._path: Path | None = None
        self._file: IO[bytes] | None = None

    @property
    def hopeless(self) -> bool:
        """Whether the document is a reject already, so that the rest of it need not be read."""
        return self.size > self._options.maximum_document_bytes

    def write(self, data: bytes) -> None:
        """Take the next part.

        Raises:
            OSError: the disk is full, for example.
        """
        self.size += len(data)
        if self.size > self._limit:
            self.discard()
        elif self._file is not None:
            self._file.write(data)
        else:
            self._data += data
            if self.size > LARGE:
                descriptor, name = tempfile.mkstemp(prefix="text-", dir=self._scratch)
                self._path, self._file = Path(name), os.fdopen(descriptor, "wb")
                self._file.write(self._data)
                self._data = bytearray()

    def item(self, line: int, subset: object = None, language: object = None) -> Item:
        """The document, of which everything was written, or why it is none."""
        options = self._options
        if self.hopeless:
            size = f"{self.size} bytes or more; at most {options.maximum_document_bytes}"
            return Reject("too_long", line, f"a document of {size}")
        if self.size > self._limit:
            return Filtered("length")
        if self._file is None or self._path is None:
            return text_item(bytes(self._data), line, options, subset, language)
        found = accept("judged below", subset, language, line, options)
        if not isinstance(found, Document):
            return found
        self._file.close()
        problem = _problem(self._path)
        if problem:
            return Reject(problem, line, f"a document of {self.size} bytes")
        document = LargeDocument(self._path, 0, self.size, line, found.subset)
        self._file = self._path = None  # another's from here on
        return document

    def discard(self) -> None:
        """Let go of what was kept."""
        self._data = bytearray()
        if self._file is not None and self._path is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)
            self._file = self._path = None

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()


def text_item(data: bytes, line: int, options: ReadOptions, subset: object = None, language: object = None) -> Item:
    """A document out of raw bytes, or why it is none."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return Reject("invalid_utf8", line, f"byte {error.start} of the document: {error.reason}")
    return accept(text, subset, language, line, options)


def _problem(path: Path) -> str:
    """Why the file is no document; empty where it is one."""
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
