"""Best-fit packing: documents placed whole into sequences, so that few are cut and little is padded.

Documents longer than a sequence are first cut into full sequences; what is left of them, and all shorter documents, are
placed in order of decreasing length, each into the sequence with the least room that still holds it (best-fit
decreasing; Ding et al. 2024, Fewer Truncations Improve Language Modeling, section 3).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.files import atomic_write
from data_prep.reading.packed import Packing, sidecar
from data_prep.reading.shards import Shard
from data_prep.tokenizing.shuffle import document_lengths

_TOGETHER = 1 << 20  # documents packed among each other; bounds memory


def best_fit(lengths: npt.ArrayLike, capacity: int) -> Packing:
    """Pack documents of `lengths` tokens, which lie one after another, into sequences of `capacity` tokens.

    Every token is in exactly one sequence. Sequences are ordered by their first token.
    """
    sizes = np.asarray(lengths, np.int64)
    starts = np.cumsum(sizes) - sizes
    found = [
        _pack(starts[at : at + _TOGETHER], sizes[at : at + _TOGETHER], capacity)
        for at in range(0, max(1, sizes.size), _TOGETHER)
    ]
    firsts = np.cumsum([0, *(len(pieces) for pieces, _ in found)])
    sequences = [ends + first for (_, ends), first in zip(found, firsts)]
    return Packing(
        np.concatenate([pieces for pieces, _ in found]), np.concatenate([np.zeros(1, np.int64), *sequences]), capacity
    )


def _pack(starts: np.ndarray, sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces in sequence order `[n, 2]`, and the number of pieces up to the end of each sequence."""
    full = sizes // capacity
    owner = np.repeat(np.arange(sizes.size), full)
    turn = np.arange(owner.size) - np.repeat(np.cumsum(full) - full, full)
    rest = sizes - full * capacity
    left = np.flatnonzero(rest)
    order = left[np.argsort(-rest[left], kind="stable")]
    bins, count = _place(rest[order].tolist(), capacity)

    first = np.concatenate([starts[owner] + turn * capacity, (starts + full * capacity)[order]])
    size = np.concatenate([np.full(owner.size, capacity, np.int64), rest[order]])
    sequence = np.concatenate([np.arange(owner.size), owner.size + bins])
    # Sequences by their first token, pieces of a sequence by theirs.
    earliest = np.full(owner.size + count, np.iinfo(np.int64).max)
    np.minimum.at(earliest, sequence, first)
    rank = np.empty(earliest.size, np.int64)
    rank[np.argsort(earliest, kind="stable")] = np.arange(earliest.size)
    arrangement = np.lexsort((first, rank[sequence]))
    pieces = np.stack([first, size], axis=1)[arrangement]
    return pieces, np.cumsum(np.bincount(rank[sequence], minlength=earliest.size))


def _place(sizes: list[int], capacity: int) -> tuple[np.ndarray, int]:
    """Best fit of `sizes` in the order given: the bin of each, and the number of bins."""
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set when some bin has r places left
    bins = np.empty(len(sizes), np.int64)
    count = 0
    for number, size in enumerate(sizes):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            chosen = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            chosen, room = count, capacity
            count += 1
        bins[number] = chosen
        room -= size
        if room:
            by_room[room].append(chosen)
            rooms |= 1 << room
    return bins, count


def write_packing(prefix: str | os.PathLike[str], length: int) -> dict[str, int]:
    """Pack the shard `prefix` for training at `length` and write its sidecar.

    Returns:
        sequences, places (tokens there is room for), tokens, documents, cut_documents.
    """
    lengths = document_lengths(Shard(prefix))
    packing = best_fit(lengths, length + 1)
    for name, values in (("pieces", packing.pieces), ("sequences", packing.sequences)):
        with atomic_write(sidecar(prefix, length, name)) as stream:
            np.save(stream, values)
    return {
        "sequences": len(packing),
        "places": len(packing) * packing.capacity,
        "tokens": int(lengths.sum()),
        "documents": int(lengths.size),
        "cut_documents": int((lengths > packing.capacity).sum()),
    }


def concat_summary(prefixes: Sequence[str | os.PathLike[str]], length: int) -> dict[str, Any]:
    """What `summary` says of best-fit, for the documents of these shards joined and cut every `length` tokens.

    Nothing is padded; `tokens` counts all, and `places` those that are in a sequence. A document is cut when its tokens
    lie in more than one sequence.
    """
    tokens = documents = cut = 0
    for prefix in prefixes:
        lengths = document_lengths(Shard(prefix))
        ends = tokens + np.cumsum(lengths)
        starts = ends - lengths
        cut += int((starts // length != np.maximum(ends - 1, starts) // length).sum())
        documents += lengths.size
        tokens += int(lengths.sum())
    sequences = max(0, tokens - 1) // length
    return {
        "sequences": sequences,
        "places": sequences * length,
        "tokens": tokens,
        "documents": documents,
        "cut_documents": cut,
        "padding": 0.0,
        "truncation": round(cut / max(1, documents), 6),
    }


def summary(parts: list[dict[str, int]]) -> dict[str, Any]:
    """Sums over shards, with `padding` (share of places left empty) and `truncation` (share of documents cut)."""
    sums: dict[str, Any] = {key: sum(part[key] for part in parts) for key in parts[0]}
    sums["padding"] = round((sums["places"] - sums["tokens"]) / max(1, sums["places"]), 6)
    sums["truncation"] = round(sums["cut_documents"] / max(1, sums["documents"]), 6)
    return sums
