"""JSON lines: one object a line, the text in one of its fields. The Pile and C4 are of this kind."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path

import orjson

from data_prep.sources.base import (
    Filtered,
    Group,
    Item,
    PieceReader,
    ReadOptions,
    Reject,
    SourceError,
    accept,
    field_path,
    look_up,
    with_fields,
)
from data_prep.sources.lines import LineReader, LongLine
from data_prep.sources.long_json import read_long_line


class JsonlReader(PieceReader):
    """Reads the lines of a piece; a group of several files is one piece."""

    def __init__(self, group: Group, options: ReadOptions, scratch: Path) -> None:
        super().__init__(group, options, scratch)
        self._text = field_path(options.text_field)
        self._subset = field_path(options.subset_field)
        self._language = field_path(options.language_field)
        self._lines: LineReader | None = None

    def items(self, piece: int) -> Iterator[Item]:
        if len(self.group.files) > 1:
            yield from self._whole_files()
            return
        size = self.group.piece_bytes
        self.file, self.lines = self.group.files[0], 0
        if self._lines is None:
            self._lines = LineReader(self.file)
        start, end = (0, None) if self.group.pieces == 1 else (piece * size, (piece + 1) * size)
        yield from self._records(self._lines, start, end)
        self.end_seen = self._lines.at_end

    def _whole_files(self) -> Iterator[Item]:
        for path in self.group.files:
            self.file, self.lines = path, 0
            try:
                self._lines = LineReader(path)
                yield from self._records(self._lines, 0, None)
            except SourceError as error:
                yield Reject(error.reason, self.lines, str(error))
            self.close()
        self.end_seen = True

    def _records(self, reader: LineReader, start: int, end: int | None) -> Iterator[Item]:
        options, text_path = self.options, self._text
        simple = len(text_path) == 1 and not self._subset and not self._language and not self.keep_fields
        key = text_path[0]
        loads = orjson.loads
        line_number = 0
        for line in reader.lines(start, end):
            line_number += 1
            self.lines = line_number
            if isinstance(line, LongLine):
                yield read_long_line(line, line_number, options, self.scratch, self.keep_fields)
                continue
            try:
                record = loads(line)
            except orjson.JSONDecodeError as error:
                record = _behind_mark(line)
                if record is None:
                    yield _broken(line, line_number, error)
                    continue
            if type(record) is not dict:
                yield Reject("invalid_json", line_number, f"the line is {type(record).__name__}, not an object")
            elif simple:
                yield accept(record.get(key), None, None, line_number, options)
            else:
                found = accept(
                    look_up(record, text_path),
                    look_up(record, self._subset) if self._subset else None,
                    look_up(record, self._language) if self._language else None,
                    line_number,
                    options,
                )
                yield with_fields(found, record, text_path) if self.keep_fields else found

    def close(self) -> None:
        if self._lines is not None:
            self._lines.stream.close()


def _behind_mark(line: bytes) -> object:
    """The record of a line that begins with a byte order mark, as the first line of a file does on some systems; None
    where there is none.
    """
    if not line.startswith(BOM_UTF8):
        return None
    try:
        return orjson.loads(line[len(BOM_UTF8) :])
    except orjson.JSONDecodeError:
        return None


def _broken(line: bytes, number: int, error: orjson.JSONDecodeError) -> Reject | Filtered:
    if not line.strip():
        return Filtered("blank_line")
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as wrong:
        return Reject("invalid_utf8", number, f"byte {wrong.start} of the line: {wrong.reason}")
    return Reject("invalid_json", number, str(error))
