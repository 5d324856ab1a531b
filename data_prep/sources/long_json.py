"""One enormous JSON line, read in pieces: the text goes to a file, everything else stays small."""

from __future__ import annotations

import os
import re
import tempfile
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import orjson

from data_prep.sources.base import Document, Item, LargeDocument, ReadOptions, Reject, accept, field_path, look_up
from data_prep.sources.lines import LongLine

_WINDOW = 1 << 20
_STOP = re.compile(rb'["\\]')
_SMALL_VALUE = 1 << 20  # a string of a field other than the text is kept up to this size


class _Broken(ValueError):
    pass


def read_long_line(line: LongLine, number: int, options: ReadOptions, scratch: Path) -> Item:
    """The document on `line`, as a LargeDocument whose text lies in `scratch`; the line's file is removed.

    The object's values are walked without being held; only the text (in a file) and short values are kept.
    """
    text_path = field_path(options.text_field)
    descriptor, name = tempfile.mkstemp(prefix="text-", dir=scratch)
    keep = False
    try:
        if line.bytes > options.maximum_document_bytes:
            return Reject("too_long", number, f"a line of {line.bytes} bytes; at most {options.maximum_document_bytes}")
        with line.path.open("rb") as source, os.fdopen(descriptor, "wb") as target:
            descriptor = -1
            skeleton = _Walker(source, target, text_path).skeleton()
            size = target.tell()
            record = orjson.loads(skeleton.removeprefix(BOM_UTF8))
        if type(record) is not dict:
            return Reject("invalid_json", number, f"the line is {type(record).__name__}, not an object")
        found = accept(
            look_up(record, text_path),
            look_up(record, field_path(options.subset_field)),
            look_up(record, field_path(options.language_field)),
            number,
            options,
        )
        if not isinstance(found, Document):
            return found
        if found.text != _PLACEHOLDER:  # the line is long for another reason than its text
            return found
        problem = _scan(Path(name))
        if problem:
            return Reject(problem, number, "the text holds a NUL character" if problem == "nul_byte" else "white space")
        keep = True
        return LargeDocument(Path(name), 0, size, number, found.subset)
    except (_Broken, orjson.JSONDecodeError) as error:
        return Reject("invalid_json", number, f"a line of {line.bytes} bytes: {error}")
    except UnicodeDecodeError as error:
        return Reject("invalid_utf8", number, f"a line of {line.bytes} bytes: {error.reason}")
    finally:
        if descriptor >= 0:
            os.close(descriptor)
        if not keep:
            Path(name).unlink(missing_ok=True)
        line.path.unlink(missing_ok=True)


_PLACEHOLDER = "the text of this field lies in a file"


class _Walker:
    """Copies a JSON text with the wanted string replaced by a placeholder and other huge strings by empty ones.

    The copy is then judged by the JSON parser, so the walk itself only has to know where strings begin and end, how
    deep the nesting is and which key stands in front.
    """

    def __init__(self, source: IO[bytes], text: IO[bytes], path: tuple[str, ...]) -> None:
        self._source, self._text, self._path = source, text, path
        self._window = b""
        self._out: list[bytes] = []
        self._size = 0

    def _more(self) -> bool:
        chunk = self._source.read(_WINDOW)
        self._window += chunk
        return bool(chunk)

    def skeleton(self) -> bytes:
        keys: list[str] = []  # keys of the enclosing objects; "" for an array
        key: str | None = None  # last string, as long as it can still turn out to be a key
        taken = False
        while self._window or self._more():
            match = re.search(rb'["{}\[\]:,]', self._window)
            if match is None:
                self._emit(self._window)
                self._window = b""
                continue
            mark = match.group()
            self._emit(self._window[: match.start()])
            self._window = self._window[match.end() :]
            if mark == b'"':
                wanted = not taken and tuple(keys) == self._path and bool(keys)
                if wanted:
                    self._copy_string()
                    self._emit(orjson.dumps(_PLACEHOLDER))
                    taken = True
                    key = None
                else:
                    raw = self._string()
                    self._emit(b'"' + raw + b'"')
                    key = orjson.loads(b'"' + raw + b'"') if raw else ""
                continue
            self._emit(mark)
            if mark == b":":
                if not keys:
                    raise _Broken("':' outside an object")
                keys[-1] = key or ""
            elif mark == b",":
                if keys:
                    keys[-1] = ""
            elif mark in (b"{", b"["):
                keys.append("")
            else:
                if not keys:
                    raise _Broken("a bracket closes nothing")
                keys.pop()
            key = None
        return b"".join(self._out)

    def _emit(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > 64 * _SMALL_VALUE:
            raise _Broken("more than 64 MB besides the text")
        self._out.append(data)

    def _raw(self) -> Iterator[bytes]:
        """The bytes of a string up to its closing quote, cut only where no escape is cut in two."""
        while True:
            position = 0
            while True:
                match = _STOP.search(self._window, position)
                if match is None:
                    safe = len(self._window)
                    break
                if match.group() == b'"':
                    if match.start():
                        yield self._window[: match.start()]
                    self._window = self._window[match.end() :]
                    return
                # An escaped character may be the first half of a surrogate pair: both stay together.
                if match.start() + 12 > len(self._window):
                    safe = match.start()
                    break
                pair = self._window[match.start() + 1 : match.start() + 4].lower() in (b"ud8", b"ud9", b"uda", b"udb")
                position = match.start() + (12 if pair else 2)
            if safe > 0 and (match is None or safe):
                head, self._window = self._window[:safe], self._window[safe:]
                if match is None:  # do not cut a UTF-8 sequence either
                    end = len(head)
                    while end > 0 and len(head) - end < 4 and head[end - 1] & 0xC0 == 0x80:
                        end -= 1
                    if end > 0 and head[end - 1] >= 0xC0:
                        end -= 1
                        head, self._window = head[:end], head[end:] + self._window
                if head:
                    yield head
            if not self._more():
                if match is not None and self._window:
                    found = self._window.find(b'"', 2)
                    if found >= 0:
                        yield from self._tail()
                        return
                raise _Broken("a string is not closed")

    def _tail(self) -> Iterator[bytes]:
        """The rest of a string when no more than a few bytes of the line are left."""
        position = 0
        while (match := _STOP.search(self._window, position)) is not None:
            if match.group() == b'"':
                yield self._window[: match.start()]
                self._window = self._window[match.end() :]
                return
            position = match.start() + 2
        raise _Broken("a string is not closed")

    def _string(self) -> bytes:
        parts, size = [], 0
        for raw in self._raw():
            size += len(raw)
            if size <= _SMALL_VALUE:
                parts.append(raw)
        return b"".join(parts) if size <= _SMALL_VALUE else b""

    def _copy_string(self) -> None:
        for raw in self._raw():
            raw.decode("utf-8")  # told apart from other mistakes
            self._text.write(orjson.loads(b'"' + raw + b'"').encode("utf-8"))


def _scan(path: Path) -> str:
    blank = True
    with path.open("rb") as stream:
        while chunk := stream.read(_WINDOW):
            if b"\x00" in chunk:
                return "nul_byte"
            blank = blank and chunk.isspace()
    return "empty_document" if blank else ""
