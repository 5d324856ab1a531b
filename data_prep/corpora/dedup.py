"""Removing documents that are in a corpus more than once: exact copies by hash, near copies by MinHash.

The first of several copies stays. Near copies: the Jaccard similarity of the sets of word 5-grams is estimated from
MinHash signatures of 128 values (Broder, "On the resemblance and containment of documents", 1997); pairs to compare
come from locality-sensitive hashing in bands (Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", section 3.4).
Documents linked by pairs at or above the threshold form a cluster.

The corpus is read twice, once for the hashes and once to write what stays. Signatures, 512 bytes for each document, lie
in a temporary file in the new folder; the memory in use is about 50 bytes per document.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import orjson
import zstandard

from data_prep.corpora.corpus import CorpusReader, CorpusWriter, Entry, default_workers, map_entries, scratch_in
from data_prep.corpora.ngrams import mix, ngram_hashes, ngrams_of_pieces, word_hashes
from data_prep.errors import DataError
from data_prep.files import atomic_write, write_json
from data_prep.sources.base import ReadOptions

SIGNATURE = 128
NGRAM = 5
_SEED = 1
_FOUND_AT_THRESHOLD = 0.95  # share of the pairs exactly at the threshold that the bands are to find
_PIECE = 1 << 16  # pairs compared at a time
_GRAMS = 1 << 20  # n-grams held at a time


@dataclass(frozen=True)
class DedupReport:
    """What was removed. Lengths in bytes of UTF-8 text; `rejects`: what could not be read, by reason; `notices`: what a
    person should know of the sources.
    """

    documents: int
    exact_copies: int
    near_copies: int
    kept: int
    kept_bytes: int
    threshold: float | None
    rejects: dict[str, int] = field(default_factory=dict)
    reject_examples: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Hashes:
    digests: np.ndarray  # uint64 [N, 2]
    signatures: np.ndarray | None  # uint32 [N, SIGNATURE]; all ones where a document has no words


def deduplicate(
    sources: Sequence[str],
    out: str | os.PathLike[str],
    options: ReadOptions,
    *,
    threshold: float | None = None,
    workers: int | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> DedupReport:
    """Write the corpus without its copies to `out`, with `report.json` and `removed.jsonl.zst` beside it.

    The result does not depend on the number of workers.

    Args:
        sources: as for `tokenize`.
        out: a new folder.
        threshold: similarity from which a near copy is removed, above 0 and at most 1; None removes exact copies only.
        workers: processes that hash.
        progress: called with the name of the pass and the number of documents done, now and then.

    Raises:
        DataError: sources that do not exist or change meanwhile, `out` not empty, a threshold out of range.
    """
    if threshold is not None and not 0 < threshold <= 1:
        raise DataError(f"the similarity of near copies is above 0 and at most 1, not {threshold}.")
    writer = CorpusWriter(out, options)
    scratch_folder = scratch_in(out)
    reader = CorpusReader(sources, options, scratch_folder)
    report = progress or (lambda _name, _count: None)
    with tempfile.TemporaryDirectory(prefix=".dedup-", dir=scratch_folder) as scratch:
        hashes = _hash_corpus(reader, Path(scratch), threshold is not None, workers or default_workers(), report)
        original = exact_originals(hashes.digests)
        exact = int(np.count_nonzero(original != np.arange(original.size)))
        if threshold is not None:
            assert hashes.signatures is not None
            original = near_originals(hashes.signatures, original, threshold)
        removed_path = Path(out) / "removed.jsonl.zst"
        compressor = zstandard.ZstdCompressor()
        with writer, atomic_write(removed_path) as raw, compressor.stream_writer(raw, closefd=False) as removed:
            places: dict[int, str] = {}
            wanted = set(original[original != np.arange(original.size)].tolist())
            for entry in reader:
                if entry.number == original.size:
                    break  # a file has grown
                if entry.number % 1000 == 0:
                    report("write", entry.number)
                keeps = int(original[entry.number])
                place = f"{entry.file}:{entry.line}"
                if keeps == entry.number:
                    writer.write(entry)
                    if keeps in wanted:
                        places[keeps] = place
                else:
                    exactly = bool((hashes.digests[entry.number] == hashes.digests[keeps]).all())
                    line = {"document": place, "copy_of": places[keeps], "exact": exactly}
                    if not exactly and hashes.signatures is not None:
                        pair = hashes.signatures[[keeps, entry.number]]
                        line["similarity"] = round(float(np.mean(pair[0] == pair[1])), 3)
                    removed.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
            reader.refuse_changed_files()
    result = DedupReport(
        documents=original.size,
        exact_copies=exact,
        near_copies=int(np.count_nonzero(original != np.arange(original.size))) - exact,
        kept=writer.documents,
        kept_bytes=writer.text_bytes,
        threshold=threshold,
        rejects=dict(reader.rejects),
        reject_examples=list(reader.examples),
        notices=reader.notices,
    )
    write_json(Path(out) / "report.json", asdict(result))
    return result


def _hash_corpus(
    reader: CorpusReader, scratch: Path, near: bool, workers: int, report: Callable[[str, int], None]
) -> _Hashes:
    count = 0
    with (scratch / "digests").open("wb") as digests, (scratch / "signatures").open("wb") as signatures:
        for _, (digest, signature) in map_entries(reader, _hash_batch, workers, near):
            digests.write(digest)
            signatures.write(signature)
            count += 1
            if count % 1000 == 0:
                report("hash", count)
    if not count:
        raise DataError(f"there is no document to deduplicate; rejects: {dict(reader.rejects) or 'none'}.")
    return _Hashes(
        np.fromfile(scratch / "digests", np.uint64).reshape(count, 2),
        np.memmap(scratch / "signatures", np.uint32, "r", shape=(count, SIGNATURE)) if near else None,
    )


def _hash_batch(near: bool, batch: list[Entry]) -> list[tuple[bytes, bytes]]:
    digests = [hashlib.blake2b(entry.text.encode("utf-8", "replace"), digest_size=16).digest() for entry in batch]
    signatures = signatures_of(batch) if near else np.empty((len(batch), 0), np.uint32)
    return [(digest, signature.tobytes()) for digest, signature in zip(digests, signatures)]


def signatures_of(batch: Sequence[Entry]) -> np.ndarray:
    """MinHash signatures of documents, uint32 `[documents, 128]`; all ones for a document without words."""
    import rensa  # here, so that exact deduplication needs no further library

    result = np.full((len(batch), SIGNATURE), np.iinfo(np.uint32).max, np.uint32)
    grams: list[np.ndarray] = []
    owners: list[int] = []
    waiting = 0

    def take() -> None:
        nonlocal waiting
        if grams:
            offsets = np.cumsum([0, *map(len, grams)], dtype=np.uint64)
            rows = rensa.RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(grams), offsets, SIGNATURE, _SEED)
            # The minimum over the pieces of a document is the minimum over the document.
            np.minimum.at(result, owners, np.asarray(rows.to_rows(), np.uint32))
        grams.clear()
        owners.clear()
        waiting = 0

    for number, entry in enumerate(batch):
        some = False
        for part in ngrams_of_pieces(entry.pieces(), NGRAM):
            if part.size:
                grams.append(part)
                owners.append(number)
                some = True
                waiting += part.size
                if waiting > _GRAMS:
                    take()
        if not some:  # fewer words than an n-gram has: all of them are one
            words = word_hashes(entry.text)
            if words.size:
                grams.append(ngram_hashes(words, words.size))
                owners.append(number)
    take()
    return result


def exact_originals(digests: np.ndarray) -> np.ndarray:
    """For each document the first one with the same digest, int64 `[N]`, from uint64 `[N, 2]`."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    return _firsts_of_groups(order, (np.diff(digests[order], axis=0) != 0).any(axis=1))


def _firsts_of_groups(order: np.ndarray, differs: np.ndarray) -> np.ndarray:
    """For each document the first of its group; `order` is sorted by group and, stably, by number within it."""
    begins = np.flatnonzero(np.concatenate([[True], differs]))
    sizes = np.diff(np.append(begins, order.size))
    originals = np.empty(order.size, np.int64)
    originals[order] = np.repeat(order[begins], sizes)
    return originals


def rows_per_band(threshold: float) -> int:
    """Most rows a band can have so that 95 % of pairs at the threshold share a band: 1 - (1 - s**r)**(128 // r)."""
    for rows in range(SIGNATURE, 1, -1):
        if 1 - (1 - threshold**rows) ** (SIGNATURE // rows) >= _FOUND_AT_THRESHOLD:
            return rows
    return 1


def near_originals(signatures: np.ndarray, originals: np.ndarray, threshold: float) -> np.ndarray:
    """For each document the first one of its cluster, int64 `[N]`.

    Args:
        signatures: uint32 `[N, 128]`.
        originals: result of `exact_originals`; exact copies follow their original.
        threshold: share of equal values from which two documents are near copies.
    """
    parents = originals.copy()
    distinct = np.flatnonzero((originals == np.arange(originals.size)) & (signatures[:, 0] != np.iinfo(np.uint32).max))
    rows = rows_per_band(threshold)
    for band in range(SIGNATURE // rows):
        keys = np.zeros(distinct.size, np.uint64)
        for column in range(band * rows, (band + 1) * rows):
            keys = mix(keys + signatures[distinct, column])
        by_key = np.argsort(keys, kind="stable")
        order = distinct[by_key]
        same = np.concatenate([[False], np.diff(keys[by_key]) == 0])
        followers = np.flatnonzero(same)
        leaders = np.maximum.accumulate(np.where(same, 0, np.arange(order.size)))
        # With the first of the group, and with the one before, which finds those the first is too far from.
        for start in range(0, followers.size, _PIECE):
            here = followers[start : start + _PIECE]
            for others in (leaders[here], here - 1):
                close = np.mean(signatures[order[here]] == signatures[order[others]], axis=1) >= threshold
                for a, b in zip(order[here[close]].tolist(), order[others[close]].tolist()):
                    _join(parents, a, b)
    for number in range(parents.size):
        parents[number] = _root(parents, number)
    return parents


def _root(parents: np.ndarray, number: int) -> int:
    while (parent := int(parents[number])) != number:
        parents[number] = parents[parent]
        number = parent
    return number


def _join(parents: np.ndarray, a: int, b: int) -> None:
    a, b = _root(parents, a), _root(parents, b)
    parents[max(a, b)] = min(a, b)
