"""JSON lines: one object a line, the text in one of its fields. The Pile and C4 are of this kind."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterator

import orjson

from data_prep.sources.base import Filtered, Item, Reject, too_long
from data_prep.sources.lines import LinePieceReader, LongLine


class JsonlReader(LinePieceReader):
    """A document a line."""

    def read(self, path: str, piece: int) -> Iterator[Item]:
        for line in self.lines_of(path, piece):
            if isinstance(line, LongLine):
                yield too_long(self.lines)
                continue
            try:
                record = orjson.loads(line.removeprefix(BOM_UTF8))  # some systems begin a file with such a mark
            except orjson.JSONDecodeError as error:
                yield _broken(line, self.lines, error)
                continue
            if type(record) is dict:
                yield self.document(record)
            else:
                yield Reject("invalid_json", self.lines, f"the line is {type(record).__name__}, not an object")


def _broken(line: bytes, number: int, error: orjson.JSONDecodeError) -> Reject | Filtered:
    if not line.strip():
        return Filtered("blank_line")
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as wrong:
        return Reject("invalid_utf8", number, f"byte {wrong.start} of the line: {wrong.reason}")
    return Reject("invalid_json", number, str(error))
