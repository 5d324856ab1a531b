"""Resolves the sources named on a command line to their files."""

from __future__ import annotations

import glob
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.errors import DataError
from data_prep.files import atomic_write
from data_prep.paths import FileIdentity, identity
from data_prep.plain_text import plain
from data_prep.sources.base import ReadOptions
from data_prep.sources.embedded import NAME as EMBEDDED
from data_prep.sources.hub import PRESETS, hub_parts
from data_prep.sources.streams import COMPRESSIONS

_SUFFIXES = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), "jsonl"),
    ".parquet": "parquet",
    **dict.fromkeys((".txt", ".text", ".md", ".rst"), "text"),
    **dict.fromkeys((".raw", ".tokens"), "wikitext"),
}
STANDARD_INPUT = "-"
# What `dedup` and `decontaminate` write beside a corpus, and what is there while they write.
REPORTS = ("report.json", "removed.jsonl.zst", "report.md")
UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class SourceFiles:
    """One source as named on the command line: its name, and its files or hub address."""

    name: str
    files: tuple[str, ...] = ()
    hub: str = ""


def find_sources(specifications: Iterable[str], options: ReadOptions) -> tuple[list[SourceFiles], list[str]]:
    """Resolve `[NAME=]PATH|FOLDER|GLOB|hub:REPO[:CONFIG[:SPLIT]]|PRESET|python-docs|-`.

    A file is read once, even if several paths lead to it.

    Returns:
        The sources in the order given, and sentences about what was left out: files of unknown kind, and given again.

    Raises:
        DataError: nothing there, two sources of the same name, or one with a NAME whose files are all another's.
    """
    sources: list[SourceFiles] = []
    named: set[str] = set()
    ignored: list[str] = []
    for specification in specifications:
        name, address = _split_name(specification)
        if name:
            named.add(name)
        if address == STANDARD_INPUT:
            sources.append(SourceFiles(name or "stdin", (STANDARD_INPUT,)))
        elif address == EMBEDDED:
            sources.append(SourceFiles(name or EMBEDDED))
        elif address in PRESETS or address.startswith("hub:"):
            hub = PRESETS.get(address, address)
            sources.append(SourceFiles(name or (address if address in PRESETS else hub.split(":")[1]), hub=hub))
        else:
            try:
                found, left = _files(address, options)
            except DataError as error:
                if not name:
                    raise
                raise DataError(f"{error} {specification!r} was taken for NAME=SOURCE; it is no file itself.") from None
            ignored += left
            sources.append(SourceFiles(name or _default_name(address), tuple(found)))
    sentences = []
    if ignored:
        sentences.append(f"{len(ignored)} file(s) of unknown kind are left out, the first is {ignored[0]}.")
    distinct, again = _once(sources)
    emptied = named - {source.name for source in distinct}
    for name, _, _, owner in again:
        if name in emptied:
            raise DataError(f"all that {name!r} names is in the source {owner!r} already; leave it out of one.")
    if again:
        _, path, first, _ = again[0]
        example = path if path == first else f"{path} is {first}"
        sentences.append(f"what is given again is read once ({len(again)} left out, the first: {example}).")
    merged = _merged(distinct)
    for source in merged:
        for path in source.files:
            try:
                path.encode()  # Python keeps other bytes of a file name as half surrogate pairs
            except UnicodeEncodeError:
                raise DataError(
                    f"the name of the file {path!r} is not UTF-8, so it cannot be recorded; rename the file."
                ) from None
    return merged, [plain(sentence) for sentence in sentences]


def _once(sources: Sequence[SourceFiles]) -> tuple[list[SourceFiles], list[tuple[str, str, str, str]]]:
    """`sources` without what an earlier one holds. What was left out: its source, the thing, what it is the same as,
    and the source that holds that.
    """
    seen: dict[FileIdentity, tuple[str, str]] = {}  # what was given first, and the source it is in
    distinct: list[SourceFiles] = []
    again: list[tuple[str, str, str, str]] = []
    for source in sources:
        new: list[str] = []
        for thing in source.files or [source.hub or EMBEDDED]:
            key: FileIdentity = ":".join(hub_parts(thing)) if source.hub else thing
            if source.files and thing != STANDARD_INPUT:
                key = identity(thing)
            if key in seen:
                again.append((source.name, thing, *seen[key]))
            else:
                seen[key] = thing, source.name
                new.append(thing)
        if new:
            distinct.append(replace(source, files=tuple(new)) if source.files else source)
    return distinct, again


def _merged(sources: Sequence[SourceFiles]) -> list[SourceFiles]:
    """Files of one name given one by one are one source.

    Raises:
        DataError: two sources of one name that are not both files.
    """
    merged: dict[str, SourceFiles] = {}
    for source in sources:
        other = merged.get(source.name)
        if other is not None and not (other.files and source.files):
            raise DataError(f"two sources are named {source.name!r}; give one another name with NAME=SOURCE.")
        merged[source.name] = replace(other, files=other.files + source.files) if other else source
    return list(merged.values())


def with_standard_input(sources: Sequence[SourceFiles], folder: Path) -> list[SourceFiles]:
    """`sources` with standard input written to a file in `folder`, so that it can be shared and read again."""
    if not any(STANDARD_INPUT in source.files for source in sources):
        return list(sources)
    spool = folder / "standard_input.jsonl"
    with atomic_write(spool) as stream:
        shutil.copyfileobj(sys.stdin.buffer, stream, 1 << 20)
    return [
        replace(source, files=tuple(str(spool) if path == STANDARD_INPUT else path for path in source.files))
        for source in sources
    ]


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
    if os.path.isfile(address):
        kind_of(address, options)
        _refuse_unfinished(path.parent)
        return [address], []
    if os.path.isdir(address):
        candidates = sorted(_without_reports(files_below(path)))
    elif matches := _matches(address):
        candidates = sorted(_without_reports(filter(_is_file, matches)))
    elif glob.has_magic(address):
        raise DataError(f"no file matches {address!r}.")
    elif os.path.exists(address):
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


def _matches(address: str) -> list[str]:
    """What a pattern matches; nothing where `address` is no pattern."""
    try:
        return glob.glob(address, recursive=True) if glob.has_magic(address) else []
    except ValueError:  # characters that no file name has
        return []


def files_below(folder: Path) -> Iterator[str]:
    """Files in `folder` and the folders in it, links followed, each folder once; hidden ones are left out.

    Raises:
        DataError: a folder cannot be listed.
    """
    seen: set[str] = set()
    for name, folders, files in os.walk(folder, onerror=_refuse_unlisted, followlinks=True):
        here = os.path.realpath(name)
        if here in seen:
            folders.clear()
            continue
        seen.add(here)
        visible = [child for child in sorted(folders) if not child.startswith(".")]
        # A link to a folder that holds this one is a cycle.
        folders[:] = [f for f in visible if not Path(here).is_relative_to(os.path.realpath(os.path.join(name, f)))]
        paths = (os.path.join(name, file) for file in files if not file.startswith("."))
        yield from filter(_is_file, paths)


def _refuse_unlisted(error: OSError) -> None:
    raise DataError(f"the folder {error.filename} cannot be listed: {error.strerror}.")


def _without_reports(paths: Iterable[str]) -> list[str]:
    """`paths` without the reports of `dedup` and `decontaminate`, which are no documents.

    Raises:
        DataError: a file is in a folder that is no corpus.
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


def _is_file(path: str) -> bool:
    """Whether it is a file; a link to nothing counts, so that it is an error and not a gap."""
    return os.path.isfile(path) or not os.path.exists(path)


def _split_name(specification: str) -> tuple[str, str]:
    """Name and address. What is there as a whole has no name, such as the folders `lang=en` of partitioned tables."""
    name, equals, address = specification.partition("=")
    if not equals or not name or "/" in name or "*" in name:
        return "", specification
    if not os.path.exists(specification) and not _matches(specification):
        return name, address
    return "", specification


def _default_name(address: str) -> str:
    if os.path.isdir(address):
        return Path(os.path.abspath(address)).name or "files"
    path = Path(address)
    if glob.has_magic(address):
        return path.parent.name or "files"
    bare = path.name
    for ending in (*COMPRESSIONS, *_SUFFIXES):
        bare = bare.removesuffix(ending)
    return bare or path.name
