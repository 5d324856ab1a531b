"""Reading every byte of a data set folder and comparing it with what the manifest says."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.errors import DataError
from data_prep.files import sha256_file
from data_prep.reading.dataset import open_shard
from data_prep.reading.manifest import Manifest, read_manifest
from data_prep.reading.manifest import Shard as ShardEntry
from data_prep.reading.packed import read_packing
from data_prep.reading.shards import Shard
from data_prep.sources.base import SourceError
from data_prep.sources.streams import ByteStream

_COUNTS = ("documents", "tokens", "text_bytes")
_PIECE = 1 << 22  # ids or index entries checked at a time


@dataclass(frozen=True)
class VerifyReport:
    """What was read, and one sentence for each thing that is wrong."""

    shards: int
    tokens: int
    documents: int
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def verify_dataset(
    path: str | os.PathLike[str], progress: Callable[[str, int], None] = lambda _shard, _tokens: None
) -> VerifyReport:
    """Check structure, checksums, index, ids and counts of every shard of every split, the raw text of the held-out
    documents, and the copy of the tokenizer.

    All problems are collected; a problem in one shard does not end the check. Memory is bounded for any size.

    Args:
        path: data set folder.
        progress: called with the name and the tokens of each shard that is done, from several threads.

    Raises:
        DataError: the manifest cannot be read, so there is nothing to compare with.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    entries = [entry for split in manifest.splits.values() for entry in split.shards]

    def check(entry: ShardEntry) -> list[str]:
        problems = list(_shard_problems(folder, entry, manifest))
        progress(entry.name, entry.tokens)
        return problems

    problems = [
        *_tokenizer_problems(folder, manifest),
        *_count_problems(folder, manifest),
        *_held_out_problems(folder, manifest),
    ]
    listed = Counter(entry.name for entry in entries)
    problems += [f"{folder}: the manifest lists shard {name} twice." for name, times in listed.items() if times > 1]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for found in pool.map(check, entries):
            problems += found
    return VerifyReport(
        len(entries), sum(entry.tokens for entry in entries), sum(entry.documents for entry in entries), problems
    )


def _tokenizer_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    # Brings the tokenizer libraries, which reading does without.
    from data_prep.tokenizers.loading import differences_from, load_tokenizer

    info = manifest.tokenizer
    if info.kind == "tiktoken":
        return  # the folder holds only the encoding's name, and tiktoken need not be installed here
    try:
        tokenizer = load_tokenizer(folder / info.file)
    except DataError as error:
        yield str(error)
        return
    yield from differences_from(tokenizer, info)


def _count_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Sources whose counts are not the sums over their shards."""
    totals: Counter[tuple[str, str]] = Counter()
    for split in manifest.splits.values():
        for entry in split.shards:
            for what in _COUNTS:
                totals[entry.source, what] += getattr(entry, what)
    for source in manifest.sources:
        for what in _COUNTS:
            total = totals[source["name"], what]
            if source[what] != total:
                yield (
                    f"{folder}: the manifest counts {source[what]} {what} of source {source['name']}, "
                    f"its shards have {total}."
                )


def _held_out_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Held-out text that is missing, damaged, or of more or fewer documents than its split. Imports have none."""
    for name in ("validation", "test"):
        if name not in manifest.splits or name not in manifest.settings:
            continue
        documents = 0
        try:
            stream = ByteStream(folder / "held_out" / f"{name}.jsonl.zst")
            while data := stream.read():
                documents += data.count(b"\n")
            stream.close()
        except SourceError as error:
            yield str(error)
            continue
        if documents != manifest.splits[name].documents:
            yield f"{stream.path} has {documents} documents, the split {name} has {manifest.splits[name].documents}."


def _shard_problems(folder: Path, entry: ShardEntry, manifest: Manifest) -> Iterator[str]:
    try:
        shard = open_shard(folder, entry, manifest.dtype)
    except DataError as error:
        yield str(error)
        return
    for path, expected in ((shard.bin, entry.sha256_bin), (shard.idx, entry.sha256_idx)):
        if (found := sha256_file(path)) != expected:
            yield f"{path} has changed since it was written: sha256 is {found}, the manifest says {expected}."
    index_problems = list(index_problems_of(shard))
    yield from index_problems
    yield from _id_problems(shard, manifest)
    if not index_problems:
        yield from _document_problems(shard, manifest.tokenizer.eod_id)
    if manifest.settings.get("packing") == "best-fit" and not index_problems:
        yield from _packing_problems(shard, int(manifest.settings["sequence_length"]))


def index_problems_of(shard: Shard) -> Iterator[str]:
    """One sentence for each way in which an index does not describe documents that follow one another without gaps."""
    expected = 0
    for start in range(0, shard.num_sequences, _PIECE):
        lengths = shard.lengths[start : start + _PIECE].astype(np.int64)
        offsets = shard.offsets[start : start + _PIECE]
        if (lengths < 0).any():
            yield f"{shard.idx}: sequence {start + int(np.argmax(lengths < 0))} has a negative length."
            return
        sizes = lengths * shard.dtype.itemsize
        right = expected + np.cumsum(sizes) - sizes
        if (offsets != right).any():
            number = int(np.argmax(offsets != right))
            yield (
                f"{shard.idx}: sequence {start + number} begins at byte {int(offsets[number])} "
                f"where the one before ends at {int(right[number])}."
            )
            return
        expected = int(right[-1] + sizes[-1])
    last = 0
    for start in range(0, shard.num_documents + 1, _PIECE):
        firsts = shard.document_index[start : start + _PIECE]
        steps = np.diff(firsts, prepend=last)
        if (steps < 0).any() or (start == 0 and firsts[0] != 0) or int(firsts[-1]) > shard.num_sequences:
            yield f"{shard.idx}: the document entries do not rise from 0 to {shard.num_sequences}."
            return
        last = int(firsts[-1])


def _id_problems(shard: Shard, manifest: Manifest) -> Iterator[str]:
    """Ids outside the vocabulary, and more or fewer END_OF_DOCUMENT than documents."""
    size, eod = manifest.tokenizer.vocab_size, manifest.tokenizer.eod_id
    outside = ends = 0
    example = None
    for start in range(0, shard.num_tokens, _PIECE):
        ids = shard.tokens[start : start + _PIECE]
        ends += int(np.count_nonzero(ids == eod))
        if int(ids.max()) >= size or int(ids.min()) < 0:
            wrong = (ids >= size) | (ids < 0)
            outside += int(np.count_nonzero(wrong))
            example = example or (int(ids[np.argmax(wrong)]), start + int(np.argmax(wrong)))
    if example:
        yield (
            f"{shard.bin}: {outside} ids are outside the vocabulary of {size}, "
            f"the first is {example[0]} at token {example[1]}."
        )
    if ends != shard.num_documents:
        yield f"{shard.bin} has {ends} END_OF_DOCUMENT ids ({eod}) for {shard.num_documents} documents; each has one."


def _document_problems(shard: Shard, eod_id: int) -> Iterator[str]:
    """Documents that do not end with END_OF_DOCUMENT; the index is known to be sound."""
    for start in range(0, shard.num_documents, _PIECE):
        firsts = shard.document_index[start : start + _PIECE + 1]
        wrong = np.diff(firsts) == 0  # not even an empty sequence
        filled = np.flatnonzero(~wrong)
        lasts = firsts[filled + 1] - 1
        ends = shard.offsets[lasts] // shard.dtype.itemsize + shard.lengths[lasts]
        wrong[filled] = ends == 0
        inner = filled[ends > 0]
        wrong[inner] = shard.tokens[ends[ends > 0] - 1] != eod_id
        if wrong.any():
            number = start + int(np.argmax(wrong))
            yield (
                f"{shard.bin}: {int(np.count_nonzero(wrong))} documents do not end with END_OF_DOCUMENT ({eod_id}), "
                f"the first is document {number}."
            )
            return


def _packing_problems(shard: Shard, length: int) -> Iterator[str]:
    """Packings that do not hold every token of the shard exactly once, in sequences that have room for them, or that
    are of other documents; the index is known to be sound.
    """
    try:
        packing = read_packing(shard.prefix, length)
    except DataError as error:
        yield str(error)
        return
    starts, sizes = packing.pieces[:, 0], packing.pieces[:, 1]
    order = np.argsort(starts, kind="stable")
    ends = np.cumsum(sizes[order])
    if (sizes < 1).any() or (starts[order] != ends - sizes[order]).any() or int(sizes.sum()) != shard.num_tokens:
        yield f"{shard.prefix}: the packing for length {length} does not hold every token once; pack it again."
        return
    begins = np.append(0, np.cumsum(shard.lengths, dtype=np.int64))[shard.document_index[:-1]]
    if not np.isin(begins[begins < shard.num_tokens], starts).all():
        yield f"{shard.prefix}: the packing for length {length} is of other documents; pack it again."
        return
    bounds = packing.sequences
    filled = np.append(0, np.cumsum(sizes))
    if bounds[0] != 0 or (np.diff(bounds) < 1).any() or (np.diff(filled[bounds]) > packing.capacity).any():
        yield f"{shard.prefix}: the packing for length {length} overfills a sequence; pack it again."
