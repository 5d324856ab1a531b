"""One enormous JSON line, read in parts: the text goes to a file, everything else stays small."""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path

import orjson

from data_prep.sources.base import LARGE, Item, ReadOptions, Reject, accept, field_path, look_up, with_fields
from data_prep.sources.lines import LongLine
from data_prep.sources.spool import Spool

_MARK = re.compile(rb'["{}\[\]:]')
_SMALL_VALUE = 1 << 20  # a string of a field that nobody asked for is kept up to this size
_SKELETON = 64 << 20  # bytes besides the text
_DEPTH = 1024  # as deep as the JSON parser goes
_LONGEST_ESCAPE = 12  # bytes: two halves of a surrogate pair, which are decoded together
_PLACEHOLDER = "the text of this field lies in a file"


class _Broken(ValueError):
    pass


def read_long_line(line: LongLine, number: int, options: ReadOptions, scratch: Path, keep_fields: bool = False) -> Item:
    """The document on `line`, its text in `scratch` where it is too large for memory.

    The object's values are walked without being held; only the text and short values are kept.

    Args:
        keep_fields: whether the document holds the other fields of its record too.

    Raises:
        SourceError: the file is damaged inside the line.
    """
    text_path = field_path(options.text_field)
    with Spool(options, scratch) as spool:
        try:
            record = orjson.loads(_Walker(line, spool, text_path, keep_fields).skeleton().removeprefix(BOM_UTF8))
        except (_Broken, orjson.JSONDecodeError) as error:
            return Reject("invalid_json", number, f"a line above {LARGE >> 20} MB: {error}")
        except UnicodeDecodeError as error:
            return Reject("invalid_utf8", number, f"a line above {LARGE >> 20} MB: {error.reason}")
        if type(record) is not dict:
            return Reject("invalid_json", number, f"the line is {type(record).__name__}, not an object")
        subset, language = (look_up(record, field_path(n)) for n in (options.subset_field, options.language_field))
        text = look_up(record, text_path)
        if text != _PLACEHOLDER:  # the line is long for another reason than its text
            found = accept(text, subset, language, number, options)
        else:
            found = spool.item(number, subset, language)
    return with_fields(found, record, text_path) if keep_fields else found


class _Walker:
    """Copies a JSON text with the wanted string replaced by a placeholder and, unless all are kept, other huge strings
    by empty ones.

    The copy is then judged by the JSON parser, so the walk itself only has to know where strings begin and end, how
    deep the nesting is and which key stands in front.
    """

    def __init__(self, line: LongLine, text: Spool, path: tuple[str, ...], keep_all: bool) -> None:
        self._line, self._text, self._path = line, text, path
        self._data, self._at = b"", 0  # what is read, and how much of it is done
        self._out = bytearray()
        self._longest = _SKELETON if keep_all else _SMALL_VALUE

    def skeleton(self) -> bytes:
        """The whole line, with little in place of much."""
        keys: list[str] = []  # keys of the enclosing objects; "" for an array
        key = ""  # last string, as long as it can still turn out to be a key
        taken = False
        while self._at < len(self._data) or self._more():
            match = _MARK.search(self._data, self._at)
            gap = self._data[self._at : match.start() if match else len(self._data)]
            if keys and b"," in gap:
                keys[-1] = key = ""
            self._emit(gap)
            if match is None:
                self._at = len(self._data)
                continue
            self._at = match.end()
            mark = match.group()
            if mark == b'"':
                if not taken and len(keys) == len(self._path) and tuple(keys) == self._path:
                    self._copy_string()
                    self._emit(orjson.dumps(_PLACEHOLDER))
                    taken = True
                    key = ""
                else:
                    raw = b'"' + self._string() + b'"'
                    self._emit(raw)
                    key = orjson.loads(raw)
                continue
            self._emit(mark)
            if mark == b":":
                if not keys:
                    raise _Broken("':' outside an object")
                keys[-1] = key
            elif mark in b"{[":
                if len(keys) == _DEPTH:
                    raise _Broken(f"nested deeper than {_DEPTH} levels")
                keys.append("")
            elif not keys:
                raise _Broken("a bracket closes nothing")
            else:
                keys.pop()
            key = ""
        return bytes(self._out)

    def _more(self) -> bool:
        part = self._line.read()
        self._data, self._at = self._data[self._at :] + part, 0
        return bool(part)

    def _emit(self, data: bytes) -> None:
        if len(self._out) + len(data) > _SKELETON:
            raise _Broken(f"more than {_SKELETON >> 20} MB besides the text")
        self._out += data

    def _string(self) -> bytes:
        """The string under way as it is written; empty where it is huge and not to be kept."""
        kept = bytearray()
        huge = False
        for raw in self._raw():
            huge = huge or len(kept) + len(raw) > self._longest
            if not huge:
                kept += raw
        return b"" if huge else bytes(kept)

    def _copy_string(self) -> None:
        for raw in self._raw():
            if self._text.hopeless:
                continue
            raw.decode("utf-8")  # told apart from other mistakes
            self._text.write(orjson.loads(b'"' + raw + b'"').encode("utf-8"))

    def _raw(self) -> Iterator[bytes]:
        """The bytes of a string up to its closing quote, cut only between characters and escapes."""
        while True:
            end = self._closing_quote()
            cut = end if end >= 0 else self._safe_cut()
            if cut > self._at:
                part = self._data[self._at : cut]
                self._at = cut
                yield part
            if end >= 0:
                self._at = end + 1
                return
            if not self._more():
                raise _Broken("a string is not closed")

    def _closing_quote(self) -> int:
        end = self._data.find(b'"', self._at)
        while end >= 0 and self._backslashes(end) % 2:
            end = self._data.find(b'"', end + 1)
        return end

    def _safe_cut(self) -> int:
        """A place near the end of what is read, and not inside a character, an escape or a pair of them."""
        data, place = self._data, len(self._data) - _LONGEST_ESCAPE
        if place <= self._at:
            return self._at
        last = data.rfind(b"\\", self._at, place)
        if last < 0:
            for _ in range(3):  # to the first byte of a character
                place -= data[place] & 0xC0 == 0x80 and place > self._at
            return place
        if not self._backslashes(last + 1) % 2:
            return last + 1  # a backslash that is escaped
        if data[last + 1 : last + 2] != b"u":
            return last + 2
        high = data[last + 2 : last + 4].lower() in (b"d8", b"d9", b"da", b"db")
        return last + (_LONGEST_ESCAPE if high else 6)

    def _backslashes(self, end: int) -> int:
        """How many backslashes stand directly in front of `end`."""
        width = 64
        while True:
            piece = self._data[max(self._at, end - width) : end]
            count = len(piece) - len(piece.rstrip(b"\\"))
            if count < len(piece) or end - width <= self._at:
                return count
            width *= 8
