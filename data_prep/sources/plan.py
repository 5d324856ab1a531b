"""From what a person names as sources to the numbered groups of files that are worked on.

The plan depends on the files alone, never on how many workers there are.
"""

from __future__ import annotations

import glob
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from data_prep.errors import DataError
from data_prep.files import atomic_write
from data_prep.sources.base import Group, PieceReader, ReadOptions, SourceError, size_of
from data_prep.sources.embedded import NAME as EMBEDDED
from data_prep.sources.embedded import EmbeddedReader
from data_prep.sources.hub import PRESETS, HubReader, hub_groups
from data_prep.sources.jsonl import JsonlReader
from data_prep.sources.lines import can_overlap
from data_prep.sources.parquet import ParquetReader, pieces_of
from data_prep.sources.streams import COMPRESSIONS, compression
from data_prep.sources.text import TextReader, WikitextReader

KINDS: dict[str, type[PieceReader]] = {
    "jsonl": JsonlReader,
    "parquet": ParquetReader,
    "text": TextReader,
    "wikitext": WikitextReader,
    "embedded": EmbeddedReader,
    "hub": HubReader,
}
_SUFFIXES = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
    ".raw": "wikitext",
    ".tokens": "wikitext",
}
STANDARD_INPUT = "-"
# What `dedup` and `decontaminate` write beside a corpus, and what is there while they write.
REPORTS = ("report.json", "removed.jsonl.zst", "report.md")
UNFINISHED = ".unfinished"
_SMALLEST_PIECE, _LARGEST_PIECE = 16 << 20, 1 << 30
_PIECES = 512  # a corpus is cut into about this many pieces, within the limits above
_SAMPLE, _SAMPLES = 1 << 12, 16  # bytes looked at in so many places to see whether a file has changed
_EXPANSION = 3  # bytes of text to expect of a byte of a compressed file


@dataclass(frozen=True)
class SourceFiles:
    """One source as named on the command line: its name, and its files or hub address."""

    name: str
    files: tuple[str, ...] = ()
    hub: str = ""


def find_sources(specifications: Iterable[str], options: ReadOptions) -> tuple[list[SourceFiles], list[str]]:
    """Resolve `[NAME=]PATH|FOLDER|GLOB|hub:REPO[:CONFIG[:SPLIT]]|PRESET|python-docs|-`.

    Returns:
        The sources in the order given, and the files that were left out because their kind is unknown.

    Raises:
        DataError: nothing there, or two sources of the same name.
    """
    sources: list[SourceFiles] = []
    ignored: list[str] = []
    for specification in specifications:
        name, address = _split_name(specification)
        if address == STANDARD_INPUT:
            sources.append(SourceFiles(name or "stdin", (STANDARD_INPUT,)))
            continue
        if address == EMBEDDED:
            sources.append(SourceFiles(name or EMBEDDED))
            continue
        if address in PRESETS or address.startswith("hub:"):
            hub = PRESETS.get(address, address)
            sources.append(SourceFiles(name or (address if address in PRESETS else hub.split(":")[1]), hub=hub))
            continue
        found, left = _files(address, options)
        ignored += left
        sources.append(SourceFiles(name or _default_name(address), tuple(found)))
    names = [source.name for source in sources]
    merged: list[SourceFiles] = []
    files: dict[str, list[str]] = {}
    for source in sources:  # files of one name given one by one are one source
        if not source.files or source.name not in files:
            merged.append(source)
        if source.files:
            files.setdefault(source.name, []).extend(source.files)
    merged = [replace(source, files=tuple(files[source.name])) if source.files else source for source in merged]
    if len({source.name for source in merged}) < len(merged):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"two sources are named {twice!r}; give one another name with NAME=SOURCE.")
    paths = Counter(path for source in merged for path in source.files)
    for path, times in paths.items():
        if times > 1:
            raise DataError(f"{path} is given twice; its documents would be in the data set twice.")
        if not _is_utf8(path):
            raise DataError(f"the name of the file {path!r} is not UTF-8, so it cannot be recorded; rename the file.")
    return merged, ignored


def mixed_kinds(sources: Iterable[SourceFiles], options: ReadOptions) -> list[str]:
    """One sentence for each source whose files are of several kinds, such as a README beside JSON lines."""
    sentences = []
    for source in sources:
        kinds = Counter(kind_of(path, options) for path in source.files if path != STANDARD_INPUT)
        if len(kinds) > 1:
            listed = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
            rarest = kinds.most_common()[-1][0]
            example = next(path for path in source.files if kind_of(path, options) == rarest)
            sentences.append(
                f"{source.name} holds files of several kinds ({listed}; for example {example}); all of them are read. "
                "Name the ones that are meant by a pattern."
            )
    return sentences


def with_standard_input(sources: Sequence[SourceFiles], folder: Path) -> list[SourceFiles]:
    """`sources` with standard input written to a file in `folder`, so that it can be shared and read again."""
    found = list(sources)
    for number, source in enumerate(found):
        if source.files == (STANDARD_INPUT,):
            spool = folder / "standard_input.jsonl"
            with atomic_write(spool) as stream:
                shutil.copyfileobj(sys.stdin.buffer, stream, 1 << 20)
            found[number] = replace(source, files=(str(spool),))
    return found


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
    sizes = {path: size_of(path) for source in sources for path in source.files}
    if not piece_bytes:
        total = sum(size * (_EXPANSION if compression(path) else 1) for path, size in sizes.items())
        piece_bytes = _SMALLEST_PIECE
        while piece_bytes < _LARGEST_PIECE and piece_bytes * _PIECES < total:
            piece_bytes *= 2
    groups: list[Group] = []
    for source in sources:
        if source.hub:
            groups += hub_groups(source.name, source.hub, len(groups), piece_bytes, revisions)
        elif not source.files:
            groups.append(Group(len(groups), source.name, "embedded", (), 0, 1, piece_bytes))
        else:
            groups += _file_groups(source, sizes, options, len(groups), piece_bytes)
    return groups


def expected_bytes(group: Group) -> int:
    """Bytes of text a group may hold, by the size of its files; 0 where nothing tells."""
    return group.bytes * (_EXPANSION if group.files and compression(group.files[0]) else 1)


def pieces_expected(group: Group) -> int:
    """Pieces a group may have, at least one."""
    return group.pieces or max(1, -(-expected_bytes(group) // group.piece_bytes))


def reader_for(group: Group, options: ReadOptions, scratch: Path) -> PieceReader:
    """The reader that yields the documents of `group`.

    Raises:
        SourceError: its file cannot be opened.
    """
    return KINDS[group.kind](group, options, scratch)


def _file_groups(
    source: SourceFiles, sizes: dict[str, int], options: ReadOptions, number: int, piece_bytes: int
) -> list[Group]:
    groups: list[Group] = []
    small: list[str] = []
    small_bytes = 0
    small_kind = ""

    def close() -> None:
        nonlocal small, small_bytes
        if small:
            at = number + len(groups)
            groups.append(Group(at, source.name, small_kind, tuple(small), small_bytes, 1, piece_bytes))
            small, small_bytes = [], 0

    for path in source.files:
        kind = kind_of(path, options)
        size = sizes[path] * (_EXPANSION if compression(path) else 1)
        if kind != small_kind or small_bytes + size > piece_bytes:
            close()
        small_kind = kind
        if size <= piece_bytes // 2:
            small.append(path)
            small_bytes += sizes[path]
            continue
        close()
        pieces = _pieces(path, kind, sizes[path], options, piece_bytes)
        at = number + len(groups)
        extra: dict[str, str | int] = {"sample": _sample(path, sizes[path])}
        groups.append(Group(at, source.name, kind, (path,), sizes[path], pieces, piece_bytes, extra))
    close()
    return groups


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


def kind_of(path: str, options: ReadOptions) -> str:
    """What a file holds, by its name, or as `options.format` says.

    Raises:
        DataError: the name does not tell.
    """
    if options.format:
        return options.format
    bare = Path(path).name.lower()
    for ending in COMPRESSIONS:
        bare = bare.removesuffix(ending)
    kind = _SUFFIXES.get(Path(bare).suffix, "")
    if not kind:
        raise DataError(
            f"{path}: the name does not say what the file holds; known endings are {', '.join(_SUFFIXES)} "
            "(also with .gz, .zst, .xz, .bz2). Say it with --format."
        )
    return kind


def _files(address: str, options: ReadOptions) -> tuple[list[str], list[str]]:
    path = Path(address)
    if path.is_file():
        kind_of(address, options)
        _refuse_unfinished(path.parent)
        return [address], []
    if path.is_dir():
        candidates = sorted(_without_reports(_files_below(path)))
    elif glob.has_magic(address):
        candidates = sorted(_without_reports(filter(_is_file, glob.glob(address, recursive=True))))
    elif path.exists():
        raise DataError(
            f"{address} can be read only once; give JSON lines from a pipe on standard input, with - as the source."
        )
    else:
        raise DataError(
            f"there is no file, folder or source {address!r}. Named sources are {EMBEDDED}, {', '.join(PRESETS)} "
            "and hub:REPOSITORY."
        )
    found, ignored = [], []
    for candidate in candidates:
        try:
            kind_of(candidate, options)
            found.append(candidate)
        except DataError:
            ignored.append(candidate)
    if not found:
        raise DataError(f"{address} holds no file of a known kind ({', '.join(_SUFFIXES)}, also compressed).")
    return found, ignored


def _files_below(folder: Path) -> Iterator[str]:
    """Files in `folder` and the folders in it, links followed; hidden ones are left out."""
    for name, folders, files in os.walk(folder, followlinks=True):
        here = os.path.realpath(name)
        folders[:] = [
            child
            for child in folders
            if not child.startswith(".") and not _holds(os.path.realpath(os.path.join(name, child)), here)
        ]
        paths = (os.path.join(name, file) for file in files if not file.startswith("."))
        yield from filter(_is_file, paths)


def _without_reports(paths: Iterable[str]) -> list[str]:
    """`paths` without the reports of `dedup` and `decontaminate`, which are no documents.

    Raises:
        DataError: one lies in a folder that is no corpus.
    """
    found = list(paths)
    reports: set[str] = set()
    for folder in {os.path.dirname(path) for path in found}:
        inside = {name: os.path.join(folder, name) for name in (*REPORTS, "manifest.json", "tokenizer")}
        _refuse_unfinished(Path(folder))
        if os.path.isfile(inside["manifest.json"]) and os.path.isdir(inside["tokenizer"]):
            raise DataError(
                f"{folder or '.'} is a data set that `tokenize` wrote, not a corpus; name the files of the corpus."
            )
        if os.path.isfile(inside["removed.jsonl.zst"]):
            reports.update(inside[name] for name in REPORTS)
    return [path for path in found if path not in reports]


def _refuse_unfinished(folder: Path) -> None:
    if (folder / UNFINISHED).exists():
        raise DataError(
            f"{folder} holds a part of a corpus: `dedup` or `decontaminate` is writing it, or was stopped. Wait for "
            "it, or remove the folder and run that again."
        )


def _holds(outer: str, inner: str) -> bool:
    """Whether `inner` is `outer` or lies in it: a link to such a folder leads in a circle."""
    return os.path.commonpath([outer, inner]) == outer


def _is_file(path: str) -> bool:
    """Whether it is a file; a link to nothing counts, so that it is an error and not a gap."""
    return os.path.isfile(path) or not os.path.exists(path)


def _is_utf8(path: str) -> bool:
    """Whether a name can be written down; Python stands in for other bytes with half surrogate pairs."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _split_name(specification: str) -> tuple[str, str]:
    name, equals, address = specification.partition("=")
    if equals and name and "/" not in name and "*" not in name and not Path(specification).exists():
        return name, address
    return "", specification


def _default_name(address: str) -> str:
    path = Path(address.rstrip("/"))
    if path.is_dir():
        return path.name
    if glob.has_magic(address):
        return path.parent.name or "files"
    bare = path.name
    for ending in (*COMPRESSIONS, *_SUFFIXES):
        bare = bare.removesuffix(ending)
    return bare or path.name
