"""Notes before the sources are read: files that look as if they should be read in another way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing

from data_prep.errors import DataError
from data_prep.plain_text import plain
from data_prep.sources.base import ReadOptions
from data_prep.sources.find import STANDARD_INPUT, SourceFiles, kind_of
from data_prep.sources.streams import ByteStream
from data_prep.sources.wikitext import begins_page

_FILES, _BYTES = 8, 8 << 20  # files of a source that are looked at, and bytes of each
_MARKS = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>")  # what other tools write between documents


def notices(sources: Sequence[SourceFiles], options: ReadOptions) -> list[str]:
    """A sentence for each source whose files are of several kinds, and for text that is one document a file although
    it seems to hold several.
    """
    by_kind = [(source, _files_by_kind(source, options)) for source in sources]
    sentences = [_mixed(source, kinds) for source, kinds in by_kind if len(kinds) > 1]
    if options.separator and not any("text" in kinds for _, kinds in by_kind):
        sentences.append("the separator is not used: it is for text files, and no source holds any.")
    for source, kinds in by_kind:
        sentences += _undivided_text(source, kinds.get("text", ()), options)
        pages = list(_beginnings(kinds.get("wikitext", ())))
        lines = (line for _, data in pages for line in data.decode("utf-8", "replace").split("\n"))
        if pages and not any(map(begins_page, lines)):
            sentences.append(
                f"{source.name}: no line of {pages[0][0]} is the heading of a WikiText page (' = Title = '), so each "
                "such file is one document; --format text reads it as plain text."
            )
    return [plain(sentence) for sentence in sentences]


def _files_by_kind(source: SourceFiles, options: ReadOptions) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for path in source.files:
        kind = options.format or "jsonl" if path == STANDARD_INPUT else kind_of(path, options)
        kinds.setdefault(kind, []).append(path)
    return kinds


def _mixed(source: SourceFiles, kinds: dict[str, list[str]]) -> str:
    counts = Counter({kind: len(files) for kind, files in kinds.items()}).most_common()
    listed = ", ".join(f"{count:,} {kind}" for kind, count in counts)
    return (
        f"{source.name} holds files of several kinds ({listed}; for example {kinds[counts[-1][0]][0]}); all of them "
        "are read. Name the ones that are meant by a pattern."
    )


def _undivided_text(source: SourceFiles, files: Sequence[str], options: ReadOptions) -> Iterable[str]:
    looked = list(_beginnings(files))
    if not options.separator:
        for path, data in looked:
            for mark in _MARKS:
                if (count := data.count(mark.encode())) > 1:
                    yield (
                        f"{path} holds {mark!r} {count:,} times or more but is read as one document; "
                        f"--separator {mark!r} makes it several."
                    )
                    return
    elif looked and not any(options.separator.encode() in data for _, data in looked):
        other = _other_line_ends(options.separator)
        path = next((path for path, data in looked if other.encode() in data), "") if other else ""
        advice = f" {path} has other line ends: is --separator {other!r} meant?" if path else ""
        yield (
            f"{source.name}: the separator {options.separator!r} is not in the first 8 MB of {looked[0][0]}"
            f"{f', nor of {len(looked) - 1} other files' if len(looked) > 1 else ''}; a text file without it is one "
            f"document.{advice}"
        )


def _other_line_ends(separator: str) -> str:
    """The separator as files of the other kind of line ends have it (CR LF, or LF alone); empty without a newline."""
    if "\r\n" in separator:
        return separator.replace("\r\n", "\n")
    return separator.replace("\n", "\r\n") if "\n" in separator else ""


def _beginnings(files: Sequence[str]) -> Iterable[tuple[str, bytes]]:
    """The first megabytes of some of `files`, spread over all; those that cannot be read are told of when they are."""
    for path in files[:: -(-len(files) // _FILES) or 1]:
        if path == STANDARD_INPUT:
            continue
        try:
            with closing(ByteStream(path)) as stream:
                data = stream.head(_BYTES)
        except DataError:
            continue
        if data:
            yield path, data
