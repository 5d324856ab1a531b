"""Parquet files (FineWeb-Edu, OpenWebText): one row a document, pieces are ranges of row groups.

In memory are some rows and the page of the file they are in; the larger the rows, the fewer of them. Writers make pages
of a megabyte or a thousand rows, whichever is more; none can be above 2 GB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.errors import DataError
from data_prep.sources.base import (
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

_ROWS = 128
_BATCH_BYTES = 16 << 20  # of rows that are held at a time, on average
_PAGES_BYTES = 2 << 30
_DICTIONARY_BYTES = 64 << 20
_BUFFER = 1 << 20  # bytes read of a column at a time; without it, a column of a row group is read whole


def row_group_bytes(path: str) -> list[int]:
    """Uncompressed bytes of each row group.

    Raises:
        SourceError: the file cannot be opened as parquet.
    """
    metadata = _open(path).metadata
    return [metadata.row_group(n).total_byte_size for n in range(metadata.num_row_groups)]


def pieces_of(path: str, piece_bytes: int) -> list[tuple[int, int]]:
    """Ranges of row groups of about `piece_bytes` each."""
    ranges, first, size = [], 0, 0
    sizes = row_group_bytes(path)
    for number, more in enumerate(sizes):
        size += more
        if size >= piece_bytes or number == len(sizes) - 1:
            ranges.append((first, number + 1))
            first, size = number + 1, 0
    return ranges or [(0, 0)]


class ParquetReader(PieceReader):
    """Reads the row groups of a piece in batches of rows, only the columns that are asked for."""

    def __init__(self, group: Group, options: ReadOptions, scratch: Path) -> None:
        super().__init__(group, options, scratch)
        self._fields = [f for f in (options.text_field, options.subset_field, options.language_field) if f]

    def items(self, piece: int) -> Iterator[Item]:
        alone = len(self.group.files) == 1
        for path in self.group.files:
            self.file, self.lines = path, 0
            try:
                groups = self._row_groups(path, piece) if alone else None
                yield from self._rows(path, groups)
            except SourceError as error:
                if alone:
                    raise
                yield Reject(error.reason, self.lines + 1, str(error))
        self.end_seen = not alone or piece + 1 == self.group.pieces

    def _row_groups(self, path: str, piece: int) -> tuple[int, int]:
        pieces = pieces_of(path, self.group.piece_bytes)
        if piece >= len(pieces):
            raise SourceError(
                "unreadable_file",
                f"{path} has {len(pieces)} pieces, but had {self.group.pieces} when the run began: it has changed",
            )
        return pieces[piece]

    def _rows(self, path: str, groups: tuple[int, int] | None) -> Iterator[Item]:
        file = _open(path)
        wanted, top = self._fields, set(file.schema_arrow.names)
        # A flattened table has columns with dots in their names.
        paths = [(name,) if name in top else field_path(name) for name in wanted]
        missing = [name for name, path in zip(wanted, paths) if path[0] not in top]
        if missing:
            raise DataError(
                f"{path} has no column {missing[0]!r}; it has {', '.join(sorted(top))}. "
                "Name the text column with --text-field."
            )
        numbers = range(*groups) if groups is not None else range(file.metadata.num_row_groups)
        options = self.options
        columns = None if self.keep_fields else wanted
        with _damage(path):
            for batch in _batches(path, file, numbers, columns):
                for row in _rows_of(_with_readable_times(batch) if self.keep_fields else batch):
                    self.lines += 1
                    if isinstance(row, UnicodeDecodeError):
                        yield Reject("invalid_utf8", self.lines, f"byte {row.start} of a field: {row.reason}")
                        continue
                    values = [look_up(row, path) for path in paths]
                    text = values.pop(0)
                    subset = values.pop(0) if options.subset_field else None
                    found = accept(text, subset, values[0] if options.language_field else None, self.lines, options)
                    text_path = field_path(options.text_field)
                    yield with_fields(found, _nested(row), text_path) if self.keep_fields else found


def records(path: str) -> Iterator[dict[str, Any]]:
    """The rows of a file with all their columns.

    Raises:
        SourceError: it is damaged, or needs too much memory.
    """
    file = _open(path)
    with _damage(path):
        for batch in _batches(path, file, range(file.metadata.num_row_groups), None):
            for row in _rows_of(batch):
                if isinstance(row, UnicodeDecodeError):
                    raise row
                yield row


@contextmanager
def _damage(path: str) -> Iterator[None]:
    """What the library raises over a file's rows, as a `SourceError`."""
    import pyarrow

    try:
        yield
    except MemoryError as error:
        raise SourceError(
            "unreadable_file", f"{path}: is damaged, or has larger pages than memory holds ({error or 'out of memory'})"
        ) from None
    except (OSError, ValueError, OverflowError, LookupError, pyarrow.ArrowException) as error:
        raise SourceError("broken_compression", f"{path}: parquet data is damaged: {error}") from None


def _batches(path: str, file: Any, numbers: Iterable[int], columns: list[str] | None) -> Iterator[Any]:
    """The rows of some row groups, as many at a time as memory is sure to hold."""
    for number in numbers:
        group = file.metadata.row_group(number)
        read = [group.column(n) for n in range(group.num_columns)]
        if columns is not None:
            heads = {name.split(".")[0] for name in columns} | set(columns)
            read = [column for column in read if {column.path_in_schema, column.path_in_schema.split(".")[0]} & heads]
        size = sum(max(0, column.total_uncompressed_size) for column in read)
        # A value is no larger than its page. Where all pages together are small enough to be held, so is any batch but
        # for values that stand in a dictionary once and in many rows.
        rows = min(_ROWS, _BATCH_BYTES * max(1, group.num_rows) // max(1, size)) if size <= _PAGES_BYTES else 1
        largest = max((_dictionary_bytes(path, column) for column in read), default=0)
        if largest:
            rows = min(rows, _DICTIONARY_BYTES // largest)
        yield from file.iter_batches(max(1, rows), row_groups=[number], columns=columns, use_threads=False)


def _dictionary_bytes(path: str, column: Any) -> int:
    """Uncompressed bytes of a column's dictionary, of which every row may hold all; 0 where there is none."""
    if not column.has_dictionary_page:
        return 0
    with Path(path).open("rb") as stream:
        stream.seek(max(0, column.dictionary_page_offset))
        header = stream.read(32)
    # Thrift's compact protocol: field 1, the kind of page, and field 2, its uncompressed size, both of them 32 bits.
    numbers, place = [], 0
    for _ in range(2):
        value = shift = 0
        place += 1  # what kind of field follows
        while place < len(header) and shift < 35:
            value |= (header[place] & 0x7F) << shift
            shift += 7
            place += 1
            if not header[place - 1] & 0x80:
                break
        numbers.append(value >> 1)  # zigzag
    return numbers[1]


def _with_readable_times(batch: Any) -> Any:
    """`batch` with dates and times as text: Python's own have no nanoseconds, and end in the year 9999."""
    import pyarrow

    for number, kind in enumerate(batch.schema.types):
        if pyarrow.types.is_timestamp(kind) or pyarrow.types.is_date(kind):
            name = batch.schema.names[number]
            batch = batch.set_column(number, name, batch.column(number).cast(pyarrow.string()))
    return batch


def _nested(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """`row` with the columns `a.b` of a flattened table as the fields of an object, as JSON lines have them."""
    if not any("." in name for name in row):
        return row
    result: dict[str, Any] = {}
    for name, value in row.items():
        *outer, last = name.split(".")
        target: Any = result
        for key in outer:
            target = target.setdefault(key, {}) if isinstance(target, dict) else None
        if isinstance(target, dict):
            target[last] = value
        else:
            result[name] = value
    return result


def _rows_of(batch: Any) -> list[dict[str, Any] | UnicodeDecodeError]:
    """The rows of a batch; for a row that is no UTF-8, which writers of parquet need not check, the error."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [error]
        return [row for number in range(batch.num_rows) for row in _rows_of(batch.slice(number, 1))]


def _open(path: str) -> Any:
    import pyarrow  # heavy, and needed for parquet alone
    import pyarrow.parquet

    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    try:
        return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER)
    except (OSError, pyarrow.ArrowException) as error:
        raise SourceError("unreadable_file", f"{path} is not a readable parquet file: {error}") from None
