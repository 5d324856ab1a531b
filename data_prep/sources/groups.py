"""From the files of the sources to the numbered groups that are worked on.

The plan depends on the files alone, never on how many workers there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import xxhash

from data_prep.errors import DataError
from data_prep.sources.base import Group, PieceReader, ReadOptions, SourceError
from data_prep.sources.embedded import EmbeddedReader
from data_prep.sources.find import SourceFiles, kind_of
from data_prep.sources.hub import HubReader, hub_groups
from data_prep.sources.jsonl import JsonlReader
from data_prep.sources.lines import can_overlap
from data_prep.sources.parquet import ParquetReader, pieces_of
from data_prep.sources.streams import compression
from data_prep.sources.text import TextReader, WikitextReader

KINDS: dict[str, type[PieceReader]] = {
    "jsonl": JsonlReader,
    "parquet": ParquetReader,
    "text": TextReader,
    "wikitext": WikitextReader,
    "embedded": EmbeddedReader,
    "hub": HubReader,
}
_SMALLEST_PIECE, _LARGEST_PIECE = 16 << 20, 1 << 30
_PIECES = 512  # a corpus is cut into about this many pieces, within the limits above
_SAMPLE, _SAMPLES = 1 << 12, 16  # bytes of a sample, and samples, that show whether a file has changed
_EXPANSION = 3  # bytes of text to expect of a byte of a compressed file


def plan_groups(
    sources: Sequence[SourceFiles],
    options: ReadOptions,
    piece_bytes: int = 0,
    revisions: Mapping[str, str] | None = None,
) -> list[Group]:
    """The numbered groups of all sources; `piece_bytes` 0 chooses by the size of the corpus.

    revisions: commits of hub data sets, by repository, where a run goes on that has begun with them.

    Raises:
        DataError: a file is missing, or its kind is unknown.
    """
    try:
        sizes = {path: Path(path).stat().st_size for source in sources for path in source.files}
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from None
    if not piece_bytes:
        total = sum(size * (_EXPANSION if compression(path) else 1) for path, size in sizes.items())
        piece_bytes = _SMALLEST_PIECE
        while piece_bytes < _LARGEST_PIECE and piece_bytes * _PIECES < total:
            piece_bytes *= 2
    groups: list[Group] = []
    for source in sources:
        if source.hub:
            groups += hub_groups(source.name, source.hub, piece_bytes, revisions)
        elif not source.files:
            groups.append(Group(0, source.name, "embedded", (), 0, 1, piece_bytes))
        else:
            groups += _file_groups(source, sizes, options, piece_bytes)
    return [replace(group, number=number) for number, group in enumerate(groups)]


def expected_bytes(group: Group) -> int:
    """Bytes of text a group may hold, by the size of its files; 0 where nothing tells."""
    return group.bytes * (_EXPANSION if group.files and compression(group.files[0]) else 1)


def pieces_expected(group: Group) -> int:
    """Pieces a group may have, at least one."""
    return group.pieces or max(1, -(-expected_bytes(group) // group.piece_bytes))


def reader_for(group: Group, options: ReadOptions) -> PieceReader:
    """The reader that yields the documents of `group`."""
    return KINDS[group.kind](group, options)


def _file_groups(source: SourceFiles, sizes: dict[str, int], options: ReadOptions, piece_bytes: int) -> Iterator[Group]:
    """The groups of a source, in the order of its files; their numbers are given later."""
    small: list[str] = []
    small_bytes, small_kind = 0, ""
    for path in source.files:
        kind = kind_of(path, options)
        size = sizes[path] * (_EXPANSION if compression(path) else 1)
        large = size > piece_bytes // 2
        if small and (large or kind != small_kind or small_bytes + size > piece_bytes):
            yield Group(0, source.name, small_kind, tuple(small), small_bytes, 1, piece_bytes)
            small, small_bytes = [], 0
        if large:
            extra: dict[str, str | int] = {"sample": _sample(path, sizes[path])}
            pieces = _pieces(path, kind, sizes[path], options, piece_bytes)
            yield Group(0, source.name, kind, (path,), sizes[path], pieces, piece_bytes, extra)
        else:
            small.append(path)
            small_bytes, small_kind = small_bytes + sizes[path], kind
    if small:
        yield Group(0, source.name, small_kind, tuple(small), small_bytes, 1, piece_bytes)


def _sample(path: str, size: int) -> str:
    """A hash (hex) of the ends of a file, and of places between them where it is not compressed.

    It tells a file that was replaced by another of its size while a run was interrupted: the checksums of gzip, zstd
    and xz and the index of parquet are at the end. Times of files would not do, for a copy of a corpus has new ones.
    """
    places = [0, max(0, size - _SAMPLE)]
    if not compression(path):
        places += [size * number // _SAMPLES for number in range(1, _SAMPLES)]
    digest = xxhash.xxh3_64()
    try:
        with Path(path).open("rb", buffering=0) as stream:
            for place in places:
                stream.seek(place)
                digest.update(stream.read(_SAMPLE))
    except OSError:
        return ""  # reported when it is read
    return digest.hexdigest()


def _pieces(path: str, kind: str, size: int, options: ReadOptions, piece_bytes: int) -> int | None:
    """How many pieces a large file has; None where only reading tells."""
    if kind == "parquet":
        try:
            return len(pieces_of(path, piece_bytes))
        except SourceError:
            return 1  # reported as a reject when it is read
    separated = kind == "text" and options.separator and not can_overlap(options.separator.encode())
    if kind != "jsonl" and not separated:
        return 1
    if compression(path):
        return None
    return max(1, -(-size // piece_bytes))
