"""The n-grams of evaluation sets, and which of their items a document holds.

An evaluation set is a file: JSON lines (plain or compressed) or parquet, of which all texts of a record belong to one
item; WikiText in its raw form, one item a page; plain text, one item. A folder means the files in it.
"""

from __future__ import annotations

import os
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from data_prep.corpora.corpus import CorpusReader
from data_prep.corpora.ngrams import ngram_hashes, word_hashes, words_of
from data_prep.errors import DataError
from data_prep.paths import FileIdentity, identity
from data_prep.sources.base import ReadOptions, SourceError
from data_prep.sources.find import files_below, kind_of
from data_prep.sources.lines import LineReader, LongLine
from data_prep.sources.parquet import records

# One question, passage or page: how to name it in a report, and its texts.
Item = tuple[str, list[str]]


@dataclass(frozen=True)
class EvaluationSet:
    """Items `first` to `end - 1` of the index come from the file `name`; `too_short` of them have no n-gram."""

    name: str
    first: int
    end: int
    too_short: int


class Match(NamedTuple):
    """What a document shares with the evaluation sets.

    ngrams: places in the index, rising. items, shares: the items they belong to and the share of each item's n-grams.
    example: words of the first of them.
    """

    ngrams: np.ndarray
    items: np.ndarray
    shares: np.ndarray
    example: str


class EvaluationIndex:
    """Every distinct n-gram of the evaluation sets and the items it is in.

    Args:
        paths: files and folders.
        n: words of an n-gram.

    Raises:
        DataError: a path that does not exist, a file that cannot be read, or no n-gram in all of them.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]], n: int) -> None:
        self.n = n
        self.labels: list[str] = []
        self.sets: list[EvaluationSet] = []
        hashes: list[np.ndarray] = []
        for path in _evaluation_files(paths):
            first = len(self.labels)
            too_short = 0
            for label, texts in _read_items(path):
                # Counting first, because most of the texts of question sets are too short.
                long_enough = [text for text in texts if len(words_of(text)) >= n]
                grams = [ngram_hashes(word_hashes(text), n) for text in long_enough]
                distinct = np.unique(np.concatenate(grams)) if grams else np.empty(0, np.uint64)
                too_short += not distinct.size
                self.labels.append(label)
                hashes.append(distinct)
            self.sets.append(EvaluationSet(str(path), first, len(self.labels), too_short))
        self.item_sizes = np.array([h.size for h in hashes], np.int64)
        if not self.item_sizes.sum():
            raise DataError(f"the evaluation sets {', '.join(map(str, paths))} hold no text of {n} words or more.")
        every = np.concatenate(hashes)
        owners = np.repeat(np.arange(len(hashes)), self.item_sizes)
        order = np.argsort(every, kind="stable")
        self.hashes, first_places = np.unique(every[order], return_index=True)
        self._owners = owners[order]
        self._owner_starts = np.append(first_places, every.size)
        # Nearly all n-grams of a corpus are in no evaluation set: a table of bits by the lowest bits says so at once.
        bits = max(16, int(16 * self.hashes.size).bit_length())
        self._mask = np.uint64((1 << min(bits, 28)) - 1)
        self._table = np.zeros(int(self._mask) + 1, bool)
        self._table[(self.hashes & self._mask).astype(np.int64)] = True

    def match(self, text: str) -> Match | None:
        """What a document of this text shares with the evaluation sets; None for nothing."""
        grams = ngram_hashes(word_hashes(text), self.n)
        likely = np.flatnonzero(self._table[(grams & self._mask).astype(np.int64)])
        places = np.searchsorted(self.hashes, grams[likely])
        places[places == self.hashes.size] = 0
        real = self.hashes[places] == grams[likely]
        if not real.any():
            return None
        ngrams = np.unique(places[real])
        items, counts = np.unique(self.owners_of(ngrams), return_counts=True)
        first = int(likely[np.argmax(real)])
        example = " ".join(words_of(text)[first : first + self.n])
        return Match(ngrams, items, counts / self.item_sizes[items], example)

    def owners_of(self, ngrams: np.ndarray) -> np.ndarray:
        """Items of the n-grams at these places of the index; an item appears once for each of them."""
        starts, ends = self._owner_starts[ngrams], self._owner_starts[ngrams + 1]
        counts = ends - starts
        steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self._owners[np.repeat(starts, counts) + steps]

    def found_shares(self, found: np.ndarray) -> np.ndarray:
        """Share of each item's n-grams that is found, given a bool for each n-gram of the index."""
        counts = np.bincount(self.owners_of(np.flatnonzero(found)), minlength=len(self.labels))
        return counts / np.maximum(self.item_sizes, 1)


def _evaluation_files(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files, each once however often it is named."""
    found: dict[FileIdentity, Path] = {}
    for path in map(Path, paths):
        files = sorted(map(Path, files_below(path))) if path.is_dir() else [path]
        if not files:
            raise DataError(f"the folder of evaluation sets {path} holds no file.")
        if files == [path] and not path.is_file():
            raise DataError(f"there is no evaluation set {path}; name files or folders of JSON lines, parquet or text.")
        for file in files:
            found.setdefault(identity(file), file)
    return list(found.values())


def _read_items(path: Path) -> Iterator[Item]:
    kind = kind_of(str(path), ReadOptions())
    if kind == "jsonl":
        yield from _json_items(path)
    elif kind == "parquet":
        number = 0
        try:
            for number, record in enumerate(records(str(path)), start=1):
                yield f"row {number}", list(_texts(record))
        except SourceError as error:
            raise DataError(f"the evaluation set {path} cannot be read after row {number}: {error}.") from None
    else:
        reader = CorpusReader([str(path)], ReadOptions())
        for entry in reader:
            title = entry.text.lstrip().partition("\n")[0]
            yield title.strip(" =")[:80] or f"line {entry.line}", [entry.text]
        if set(reader.rejects) - {"empty_document"}:  # WikiText begins with a blank line
            raise DataError(f"the evaluation set {path} cannot be read: {reader.examples[0]}.")


def _json_items(path: Path) -> Iterator[Item]:
    for number, line in enumerate(LineReader(str(path)).lines(0, None), start=1):
        if isinstance(line, LongLine):
            raise DataError(f"{path}:{number}: the line is too long for an evaluation set.")
        if not line.strip():
            continue
        try:
            record = orjson.loads(line.removeprefix(BOM_UTF8))
        except orjson.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: the evaluation set is not JSON lines ({error}).") from None
        yield f"line {number}", list(_texts(record))


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
