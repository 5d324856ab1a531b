"""Parquet files (FineWeb-Edu, OpenWebText): one row a document, pieces are ranges of row groups.

In memory are some rows and the page of the file they are in. Writers make pages of a megabyte or a thousand rows,
whichever is more, so memory is bounded as long as rows are not enormous.
"""

from __future__ import annotations

from collections.abc import Iterator
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
)

_ROWS = 128
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
        self.end_seen = True

    def _row_groups(self, path: str, piece: int) -> tuple[int, int]:
        pieces = pieces_of(path, self.group.piece_bytes)
        if piece >= len(pieces):
            raise SourceError(
                "unreadable_file",
                f"{path} has {len(pieces)} pieces, but had {self.group.pieces} when the run began: it has changed",
            )
        return pieces[piece]

    def _rows(self, path: str, groups: tuple[int, int] | None) -> Iterator[Item]:
        import pyarrow

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
        try:
            for batch in file.iter_batches(_ROWS, row_groups=list(numbers), columns=wanted, use_threads=False):
                for row in _rows_of(batch):
                    self.lines += 1
                    if isinstance(row, UnicodeDecodeError):
                        yield Reject("invalid_utf8", self.lines, f"byte {row.start} of a field: {row.reason}")
                        continue
                    values = [look_up(row, path) for path in paths]
                    text = values.pop(0)
                    subset = values.pop(0) if options.subset_field else None
                    yield accept(text, subset, values[0] if options.language_field else None, self.lines, options)
        except MemoryError:
            raise
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise SourceError("broken_compression", f"{path}: parquet data is damaged: {error}") from None


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
