"""What a reader of a corpus yields: documents, and what had to be left out."""

from __future__ import annotations

import base64
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

from data_prep.errors import DataError

MAXIMUM = 64 << 20  # bytes of a document, and of a JSON line; what is above it is a reject, and is never held in memory

FORMATS = ("jsonl", "parquet", "text", "wikitext")


class SourceError(DataError):
    """A source cannot be read any further; `reason` is the word under which it is counted."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Document(NamedTuple):
    """One document: its text, the same as UTF-8, the line (or row, or file) it comes from, its subset where the source
    names one, and where a reader keeps fields, the `record_head` of its record.
    """

    text: str
    data: bytes
    line: int
    subset: str | None = None
    head: bytes = b""


class Reject(NamedTuple):
    """Something that is not in the shards though it was in the source. `line` counts from 1 inside the piece."""

    reason: str
    line: int
    detail: str


class Filtered(NamedTuple):
    """A document a filter left out; counted, not listed."""

    reason: str


Item = Document | Reject | Filtered


@dataclass(frozen=True)
class ReadOptions:
    """How documents are found in a source and which of them are wanted.

    text_field, subset_field, language_field: dotted names of JSON or parquet fields. subsets: the subsets wanted; empty
    for all. languages: the values wanted in language_field. separator: what stands between documents of a text file;
    empty for one document a file. minimum_bytes, maximum_bytes: UTF-8 length of a wanted document (0: no limit).
    format: `jsonl`, `parquet`, `text` or `wikitext` for files whose names do not say.
    """

    text_field: str = "text"
    subset_field: str = ""
    subsets: tuple[str, ...] = ()
    language_field: str = ""
    languages: tuple[str, ...] = ()
    separator: str = ""
    minimum_bytes: int = 0
    maximum_bytes: int = 0
    format: str = ""

    def __post_init__(self) -> None:
        if self.subsets and not self.subset_field:
            raise DataError("subsets were named without a field to find them in; add --subset-field.")
        if bool(self.languages) != bool(self.language_field):
            raise DataError("a language filter needs both --language and --language-field.")
        if self.maximum_bytes and self.maximum_bytes < self.minimum_bytes:
            raise DataError(f"the maximum length {self.maximum_bytes} is below the minimum {self.minimum_bytes}.")
        if not self.text_field:
            raise DataError("--text-field must name a field.")
        if self.format and self.format not in FORMATS:
            raise DataError(f"--format is one of {', '.join(FORMATS)}, not {self.format!r}.")


@dataclass(frozen=True)
class Group:
    """Files that are read together, and the unit in which pieces are numbered.

    Several small files form one group of one piece. A large file is a group of its own, read in pieces of `piece_bytes`
    bytes of (decompressed) text; `pieces` is None where the number is known only at the end.
    """

    number: int
    source: str
    kind: str
    files: tuple[str, ...]
    bytes: int
    pieces: int | None
    piece_bytes: int
    extra: dict[str, str | int] = field(default_factory=dict)


class PieceReader(ABC):
    """Base of all readers: yields the items of one piece.

    A reader lives as long as its worker works on the group, so that the next piece starts where the last one ended.
    """

    def __init__(self, group: Group, options: ReadOptions) -> None:
        self.group, self.options = group, options
        self.paths = tuple(map(field_path, (options.text_field, options.subset_field, options.language_field)))
        self.end_seen = False  # set by items() when the group ends in this piece
        self.lines = 0  # lines (rows, files) read in this piece
        self.file = ""  # file under way
        self.keep_fields = False  # documents also hold the other fields of their records

    def items(self, piece: int) -> Iterator[Item]:
        """Items of piece number `piece`. A file that cannot be read any further is a reject and ends its group, unless
        the group has other files.
        """
        broken = False
        for path in self.group.files or ("",):
            self.file, self.lines = path, 0
            try:
                yield from self.read(path, piece)
            except SourceError as error:
                broken = True
                yield Reject(error.reason, self.lines, str(error))
        pieces = self.group.pieces
        self.end_seen = broken or (self.at_end() if pieces is None else piece + 1 >= pieces)

    def all_items(self) -> Iterator[Item]:
        """Items of all pieces."""
        piece = 0
        while not self.end_seen:
            yield from self.items(piece)
            piece += 1

    @abstractmethod
    def read(self, path: str, piece: int) -> Iterator[Item]:
        """Items of a piece of one file of the group (an empty path where the group has no files).

        Raises:
            SourceError: nothing more can be read from the file.
        """

    def at_end(self) -> bool:
        """Whether the file under way is read to its end; asked where its number of pieces is not known."""
        return True

    def document(self, record: object) -> Item:
        """The document in a record, or why there is none."""
        text, subset, language = (look_up(record, path) for path in self.paths)
        found = accept(text, subset, language, self.lines, self.options)
        return with_fields(found, record, self.paths[0]) if self.keep_fields else found

    def close(self) -> None:  # noqa: B027  (most readers hold nothing open between pieces)
        """Close open files."""


def accept(text: object, subset: object, language: object, line: int, options: ReadOptions) -> Item:
    """Judge one record: a Document, or why it is not one."""
    if type(text) is not str:
        if text is None:
            return Reject("missing_field", line, f"no field {options.text_field!r}")
        return Reject("wrong_type", line, f"field {options.text_field!r} is {type(text).__name__}, not a string")
    name: str | None = None
    if options.subset_field:
        if type(subset) is not str:
            return Reject("missing_field", line, f"no string in the field {options.subset_field!r}")
        if options.subsets and subset not in options.subsets:
            return Filtered("subset")
        name = subset
    if options.languages and language not in options.languages:
        return Filtered("language")
    if not text or text.isspace():
        return Reject("empty_document", line, "the text is empty or white space")
    try:
        # What `text.encode()` gives; but this way the string keeps it, and the encoder need not make it again.
        data = orjson.dumps(orjson.Fragment(text))
    except orjson.JSONEncodeError:
        return Reject("invalid_utf8", line, "the text holds half a surrogate pair")
    if len(data) > MAXIMUM:
        return too_long(line)
    if b"\x00" in data:  # found several times faster there than in text of two bytes a character
        return Reject("nul_byte", line, f"NUL character at position {text.index(chr(0))}")
    return Document(text, data, line, name)


def too_long(line: int) -> Reject:
    """The reject for a document or line above `MAXIMUM`."""
    return Reject("too_long", line, f"it is above {MAXIMUM >> 20} MB")


def record_head(record: object, path: tuple[str, ...]) -> bytes:
    """`record` as JSON up to the first character of the text at `path`, which is put last: behind the text there are
    one `"` and as many `}` as `path` has keys.

    Raises:
        orjson.JSONEncodeError: it cannot be written as JSON.
    """
    return orjson.dumps(_with_text_last(record, path), default=_as_json)[: -len(path) - 1]


def with_fields(found: Item, record: object, path: tuple[str, ...]) -> Item:
    """The document with the other fields of its record; a reject where they cannot be written again."""
    if not isinstance(found, Document):
        return found
    try:
        return found._replace(head=record_head(record, path))
    except orjson.JSONEncodeError as error:
        return Reject("invalid_json", found.line, f"its other fields cannot be written again: {error}")


def _with_text_last(record: object, path: tuple[str, ...]) -> dict[str, Any]:
    fields = {key: value for key, value in record.items() if key != path[0]} if isinstance(record, Mapping) else {}
    inner = record.get(path[0]) if isinstance(record, Mapping) else None
    fields[path[0]] = _with_text_last(inner, path[1:]) if path[1:] else ""
    return fields


def _as_json(value: object) -> str:
    """What stands for a value that JSON has no kind of, such as a decimal number or bytes."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def field_path(name: str) -> tuple[str, ...]:
    """`meta.pile_set_name` as the keys to follow."""
    return tuple(name.split(".")) if name else ()


def look_up(record: object, path: tuple[str, ...]) -> object:
    """The value at `path` inside nested dicts; None where a key is missing."""
    for key in path:
        if type(record) is not dict:
            return None
        record = record.get(key)
    return record
