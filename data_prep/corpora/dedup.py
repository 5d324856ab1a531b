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

from data_prep.corpora.corpus import CorpusReader, CorpusWriter, Entry, map_entries, removed_documents
from data_prep.corpora.ngrams import mix, ngram_hashes, word_hashes
from data_prep.errors import DataError
from data_prep.files import write_json
from data_prep.sources.base import ReadOptions

SIGNATURE = 128
NGRAM = 5
_SEED = 1
_PIECE = 1 << 16  # pairs compared at a time
_GRAMS = 1 << 20  # n-grams held at a time


@dataclass(frozen=True)
class DedupReport:
    """What was removed. rejects: what could not be read, by reason. notices: notes on the sources."""

    documents: int
    exact_copies: int
    near_copies: int
    kept: int
    kept_bytes: int
    threshold: float | None
    rejects: dict[str, int] = field(default_factory=dict)
    reject_examples: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def deduplicate(
    sources: Sequence[str],
    out: str | os.PathLike[str],
    options: ReadOptions,
    *,
    threshold: float | None = None,
    workers: int = 1,
    progress: Callable[[str, int], None] = lambda _what, _count: None,
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
    reader = CorpusReader(sources, options, writer.folder)
    with tempfile.TemporaryDirectory(prefix=".dedup-", dir=writer.folder) as scratch:
        digests, signatures = _hash_corpus(reader, Path(scratch), threshold is not None, workers, progress)
        original = exact_originals(digests)
        exact = _copies(original).size
        if signatures is not None and threshold is not None:
            original = near_originals(signatures, original, threshold)
        with writer, removed_documents(writer.folder) as write_removed:
            places: dict[int, str] = {}
            wanted = set(original[_copies(original)].tolist())
            for entry in reader:
                if entry.number == original.size:
                    break  # a file has grown
                if entry.number % 1000 == 0:
                    progress("write", entry.number)
                keeps = int(original[entry.number])
                if keeps == entry.number:
                    writer.write(entry)
                    if keeps in wanted:
                        places[keeps] = entry.place
                else:
                    exactly = bool((digests[entry.number] == digests[keeps]).all())
                    line = {"document": entry.place, "copy_of": places[keeps], "exact": exactly}
                    if not exactly and signatures is not None:
                        pair = signatures[[keeps, entry.number]]
                        line["similarity"] = round(float(np.mean(pair[0] == pair[1])), 3)
                    write_removed(line)
            reader.refuse_changed_files()
    result = DedupReport(
        documents=original.size,
        exact_copies=exact,
        near_copies=_copies(original).size - exact,
        kept=writer.documents,
        kept_bytes=writer.text_bytes,
        threshold=threshold,
        rejects=dict(reader.rejects),
        reject_examples=list(reader.examples),
        notices=reader.notices,
    )
    write_json(writer.folder / "report.json", asdict(result))
    return result


def _hash_corpus(
    reader: CorpusReader, scratch: Path, near: bool, workers: int, progress: Callable[[str, int], None]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Digests, uint64 `[N, 2]`, and with `near` signatures as of `signatures_of`, which lie in `scratch`."""
    count = 0
    with (scratch / "digests").open("wb") as digests, (scratch / "signatures").open("wb") as signatures:
        for _, (digest, signature) in map_entries(reader, _hash_batch, workers, near):
            digests.write(digest)
            signatures.write(signature)
            count += 1
            if count % 1000 == 0:
                progress("hash", count)
    if not count:
        raise DataError(f"there is no document to deduplicate; rejects: {dict(reader.rejects) or 'none'}.")
    return (
        np.fromfile(scratch / "digests", np.uint64).reshape(count, 2),
        np.memmap(scratch / "signatures", np.uint32, "r", shape=(count, SIGNATURE)) if near else None,
    )


def _hash_batch(near: bool, batch: list[Entry]) -> list[tuple[bytes, bytes]]:
    digests = [hashlib.blake2b(entry.text.encode(), digest_size=16).digest() for entry in batch]
    signatures = signatures_of([entry.text for entry in batch]) if near else np.empty((len(batch), 0), np.uint32)
    return [(digest, signature.tobytes()) for digest, signature in zip(digests, signatures)]


def signatures_of(texts: Sequence[str]) -> np.ndarray:
    """MinHash signatures of texts, uint32 `[texts, 128]`; all ones for a text without words."""
    import rensa  # here, so that exact deduplication needs no further library

    result = np.full((len(texts), SIGNATURE), np.iinfo(np.uint32).max, np.uint32)
    grams: list[np.ndarray] = []
    owners: list[int] = []
    held = 0
    for number, text in enumerate(texts):
        words = word_hashes(text)
        if words.size:
            # A text of fewer words than an n-gram has is one n-gram.
            grams.append(ngram_hashes(words, min(NGRAM, words.size)))
            owners.append(number)
            held += grams[-1].size
        if owners and (held > _GRAMS or number == len(texts) - 1):
            offsets = np.cumsum([0, *map(len, grams)], dtype=np.uint64)
            rows = rensa.RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(grams), offsets, SIGNATURE, _SEED)
            result[owners] = rows.to_rows()
            grams, owners, held = [], [], 0
    return result


def _copies(originals: np.ndarray) -> np.ndarray:
    """Numbers of the documents that are not the original of their group."""
    return np.flatnonzero(originals != np.arange(originals.size))


def exact_originals(digests: np.ndarray) -> np.ndarray:
    """For each document the first one with the same digest, int64 `[N]`, from uint64 `[N, 2]`."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable, so that a group begins with its first document
    differs = (np.diff(digests[order], axis=0) != 0).any(axis=1)
    begins = np.flatnonzero(np.concatenate([[True], differs]))
    originals = np.empty(order.size, np.int64)
    originals[order] = np.repeat(order[begins], np.diff(np.append(begins, order.size)))
    return originals


def rows_per_band(threshold: float) -> int:
    """Most rows a band can have so that 95 % of pairs at the threshold share a band: 1 - (1 - s**r)**(128 // r)."""
    for rows in range(SIGNATURE, 1, -1):
        if 1 - (1 - threshold**rows) ** (SIGNATURE // rows) >= 0.95:
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
