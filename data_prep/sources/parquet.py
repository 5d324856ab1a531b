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
from data_prep.sources.base import Item, PieceReader, Reject, SourceError, accept, field_path, look_up, with_fields

_ROWS = 128
_BATCH_BYTES = 16 << 20  # of rows that are held at a time, on average
_PAGES_BYTES = 2 << 30
_DICTIONARY_BYTES = 64 << 20
_BUFFER = 1 << 20  # bytes read of a column at a time; without it, a column of a row group is read whole


def pieces_of(path: str, piece_bytes: int) -> list[tuple[int, int]]:
    """Ranges of row groups of about `piece_bytes` uncompressed bytes each.

    Raises:
        SourceError: the file cannot be opened as parquet.
    """
    metadata = _open(path).metadata
    ranges, first, size = [], 0, 0
    for number in range(metadata.num_row_groups):
        size += metadata.row_group(number).total_byte_size
        if size >= piece_bytes or number == metadata.num_row_groups - 1:
            ranges.append((first, number + 1))
            first, size = number + 1, 0
    return ranges or [(0, 0)]


class ParquetReader(PieceReader):
    """Reads the row groups of a piece in batches of rows, only the columns that are asked for."""

    def read(self, path: str, piece: int) -> Iterator[Item]:
        file = _open(path)
        options, top = self.options, set(file.schema_arrow.names)
        names = [options.text_field, options.subset_field, options.language_field]
        # A flattened table has columns with dots in their names.
        paths = [(name,) if name in top else field_path(name) for name in names]
        if missing := [name for name, found in zip(names, paths) if found and found[0] not in top]:
            raise DataError(
                f"{path} has no column {missing[0]!r}; it has {', '.join(sorted(top))}. "
                "Name the text column with --text-field."
            )
        numbers, columns = self._row_groups(path, piece), None if self.keep_fields else [*filter(None, names)]
        with _damage(path):
            for row in _rows(path, file, numbers, columns, times_as_text=self.keep_fields):
                self.lines += 1
                if isinstance(row, UnicodeDecodeError):
                    yield Reject("invalid_utf8", self.lines, f"byte {row.start} of a field: {row.reason}")
                    continue
                text, subset, language = (look_up(row, found) for found in paths)
                item = accept(text, subset, language, self.lines, options)
                yield with_fields(item, _nested(row), self.paths[0]) if self.keep_fields else item

    def _row_groups(self, path: str, piece: int) -> range:
        pieces = pieces_of(path, self.group.piece_bytes)
        if len(self.group.files) > 1 or self.group.pieces == 1:
            return range(pieces[-1][1])
        if piece >= len(pieces):
            raise SourceError(
                "unreadable_file",
                f"{path} has {len(pieces)} pieces, but had {self.group.pieces} when the run began: it has changed",
            )
        return range(*pieces[piece])


def records(path: str) -> Iterator[dict[str, Any]]:
    """The rows of a file with all their columns.

    Raises:
        SourceError: it is damaged, or needs too much memory.
    """
    file = _open(path)
    with _damage(path):
        for row in _rows(path, file, range(file.metadata.num_row_groups), None):
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


def _rows(
    path: str, file: Any, numbers: Iterable[int], columns: list[str] | None, times_as_text: bool = False
) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """The rows of some row groups; for a row that is no UTF-8, which writers of parquet need not check, the error."""
    for batch in _batches(path, file, numbers, columns):
        batch = _with_readable_times(batch) if times_as_text else batch
        try:
            yield from batch.to_pylist()
        except UnicodeDecodeError:
            for number in range(batch.num_rows):
                try:
                    yield from batch.slice(number, 1).to_pylist()
                except UnicodeDecodeError as error:
                    yield error


def _batches(path: str, file: Any, numbers: Iterable[int], columns: list[str] | None) -> Iterator[Any]:
    """The rows of some row groups, as many at a time as fit in memory for certain."""
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


def _open(path: str) -> Any:
    import pyarrow  # heavy, and needed for parquet alone
    import pyarrow.parquet

    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    try:
        return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER)
    except (OSError, pyarrow.ArrowException) as error:
        raise SourceError("unreadable_file", f"{path} is not a readable parquet file: {error}") from None
