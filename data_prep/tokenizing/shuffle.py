"""Document shuffle at write time, in memory that does not grow with the corpus.

Every document gets a hash of (seed, its number in its source). The hash's high bits choose one of at most 256 new
shards; the documents of a new shard are ordered by the hash. Documents, their lengths and their hashes first move to
temporary files, three per new shard, in the order met; then each new shard is written in order. Only training documents
are shuffled, each source for itself, so that sources can still be mixed by weight.

In memory are the lengths and hashes of one old or new shard: 16 bytes for each of its documents, and some copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from data_prep.reading.manifest import Shard as Entry
from data_prep.reading.shards import Shard, ShardWriter

_SMALLEST = 64 << 20  # bytes of ids of a new shard, at least
_MOST = 256  # new shards per source
_BLOCK = 1 << 20  # ids gathered at once


def shuffle_source(folder: Path, scratch: Path, entries: Sequence[Entry], seed: int, number: int) -> list[Entry]:
    """Write the documents of `entries` (one source) in another order; the old shards stay.

    Args:
        number: of the source, for the names of the new shards.

    Returns:
        The new shards. Their text bytes are shared out by tokens; the sum is exact.
    """
    shards = [Shard(folder / entry.name) for entry in entries]
    dtype = shards[0].dtype
    tokens = sum(shard.num_tokens for shard in shards)
    count = int(np.clip(tokens * dtype.itemsize // _SMALLEST, 1, _MOST))
    heaps = [_Heap(scratch / f"shuffle-{number:03d}-{bucket:03d}", dtype) for bucket in range(count)]
    first = 0
    for shard in shards:
        hashes = document_hashes(seed, first, shard.num_documents)
        sizes = document_lengths(shard)
        starts = np.cumsum(sizes) - sizes
        buckets = ((hashes >> np.uint64(32)) * np.uint64(count)) >> np.uint64(32)
        for bucket in range(count):
            chosen = np.flatnonzero(buckets == bucket)
            if chosen.size:
                heaps[bucket].add(_gathered(shard.tokens, starts[chosen], sizes[chosen]), sizes[chosen], hashes[chosen])
        first += shard.num_documents
    text_bytes = sum(entry.text_bytes for entry in entries)
    made: list[Entry] = []
    before = 0
    for bucket, heap in enumerate(heaps):
        if not heap.filled:
            continue
        ids, sizes, hashes = heap.read()
        order = np.argsort(hashes, kind="stable")
        starts = np.cumsum(sizes) - sizes
        name = f"train-{number:05d}-{bucket:05d}-shuffled"
        with ShardWriter(folder / name, dtype) as writer:
            _write_documents(writer, ids, starts[order], sizes[order])
        heap.remove()
        after = before + writer.summary.tokens
        share = text_bytes * after // tokens - text_bytes * before // tokens
        before = after
        done = writer.summary
        made.append(
            Entry(name, done.tokens, done.documents, share, done.sha256_bin, done.sha256_idx, entries[0].source)
        )
    return made


class _Heap:
    """The documents of one new shard in the order they were met, in files: ids, lengths and hashes."""

    def __init__(self, stem: Path, dtype: np.dtype) -> None:
        self._paths = [stem.with_suffix(f".{kind}") for kind in ("ids", "lengths", "hashes")]
        self._types = (dtype, np.dtype(np.int64), np.dtype(np.uint64))
        self.filled = False
        self.remove()  # what a stopped run left

    def add(self, blocks: Iterable[np.ndarray], lengths: np.ndarray, hashes: np.ndarray) -> None:
        for path, arrays in zip(self._paths, (blocks, [lengths], [hashes])):
            with path.open("ab") as stream:
                for array in arrays:
                    stream.write(array.tobytes())
        self.filled = True

    def read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids (mapped), lengths and hashes."""
        ids, *others = self._paths
        lengths, hashes = (np.fromfile(path, kind) for path, kind in zip(others, self._types[1:]))
        mapped = np.memmap(ids, self._types[0], mode="r") if lengths.sum() else np.zeros(0, self._types[0])
        return mapped, lengths, hashes

    def remove(self) -> None:
        for path in self._paths:
            path.unlink(missing_ok=True)


def document_hashes(seed: int, first: int, count: int) -> np.ndarray:
    """uint64 `[count]` for the documents `first`, `first + 1`, ...: the splitmix64 generator at these places."""
    with np.errstate(over="ignore"):
        value = np.arange(first + 1, first + count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        value += _mixed(np.full(1, seed, np.uint64))
        return _mixed(value)


def _mixed(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def document_lengths(shard: Shard) -> np.ndarray:
    """Tokens of each document, int64 `[documents]`."""
    ends = np.concatenate([[0], np.cumsum(shard.lengths, dtype=np.int64)])
    return np.diff(ends[shard.document_index])


def _write_documents(writer: ShardWriter, ids: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> None:
    at = 0
    while at < sizes.size:
        # As many documents as make a block, or one that is larger than a block.
        count = max(1, int(np.searchsorted(np.cumsum(sizes[at : at + 65536]), _BLOCK, side="right")))
        part = slice(at, at + count)
        if count == 1 and sizes[at] > _BLOCK:
            for block in _gathered(ids, starts[part], sizes[part]):
                writer.extend(block)
            writer.end_document()
        else:
            writer.write(np.concatenate(list(_gathered(ids, starts[part], sizes[part]))), sizes[part])
        at += count


def _gathered(tokens: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> Iterator[np.ndarray]:
    """The documents one after another, in blocks of about a million ids."""
    waiting: list[np.ndarray] = []
    held = 0
    for start, size in zip(starts.tolist(), sizes.tolist()):
        for at in range(start, start + size, _BLOCK):
            part = tokens[at : min(at + _BLOCK, start + size)]
            waiting.append(part)
            held += part.size
            if held >= _BLOCK:
                yield np.concatenate(waiting)
                waiting, held = [], 0
    if waiting:
        yield np.concatenate(waiting)
