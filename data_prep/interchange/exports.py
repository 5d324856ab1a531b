"""Data sets for other stacks: one `.bin`/`.idx` pair per split, named as Megatron and GPT-NeoX name theirs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.errors import DataError
from data_prep.paths import new_folder
from data_prep.reading.dataset import open_shard
from data_prep.reading.manifest import read_manifest
from data_prep.reading.shards import Shard, ShardSummary, ShardWriter
from data_prep.tokenizers.loading import copy_recorded_tokenizer

_PIECE = 1 << 22  # ids in memory at a time


@dataclass(frozen=True)
class ExportReport:
    """Paths without suffix by split, as those stacks take them, and what is in them; and the tokenizer's file."""

    prefixes: dict[str, Path]
    summaries: dict[str, ShardSummary]
    tokenizer: Path


def export_megatron(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    progress: Callable[[str, int], None] = lambda _split, _documents: None,
) -> ExportReport:
    """Write every split of a data set as `<out>/<split>_text_document.bin` and `.idx`, its shards one after another.

    Args:
        path: data set folder.
        out: a new folder.
        progress: called with the split and the number of documents copied.

    Raises:
        DataError: a missing or damaged manifest or shard, or `out` not empty.
    """
    folder, target = Path(path), new_folder(out)
    manifest = read_manifest(folder)
    tokenizer = folder / manifest.tokenizer.file
    if not tokenizer.is_file():
        raise DataError(f"{tokenizer} is missing; copy the data set again or rebuild it.")
    opened = {
        name: [open_shard(folder, entry, manifest.dtype) for entry in split.shards]
        for name, split in manifest.splits.items()
    }
    prefixes: dict[str, Path] = {}
    summaries: dict[str, ShardSummary] = {}
    for name, shards in opened.items():
        prefixes[name] = target / f"{name}_text_document"
        with ShardWriter(prefixes[name], manifest.dtype) as writer:
            for shard in shards:
                copy_documents(shard, writer)
                progress(name, writer.documents)
        summaries[name] = writer.summary
    copied = copy_recorded_tokenizer(tokenizer, manifest.tokenizer, target / "tokenizer")
    return ExportReport(prefixes, summaries, copied)


def copy_documents(shard: Shard, writer: ShardWriter) -> None:
    """Append all documents of a shard, a bounded number of ids at a time.

    Raises:
        DataError: the shard's index points outside its ids.
    """
    first = 0
    while first < shard.num_documents:
        ends = _document_ends(shard, first, min(first + _PIECE, shard.num_documents))
        count = max(1, int(np.searchsorted(ends, ends[0] + _PIECE)))
        start, stop = int(ends[0]), int(ends[min(count, ends.size - 1)])
        if count == 1 and stop - start > _PIECE:
            for piece in range(start, stop, _PIECE):
                writer.extend(shard.tokens[piece : min(piece + _PIECE, stop)])
            writer.end_document()
        else:
            count = min(count, ends.size - 1)
            writer.write(shard.tokens[start:stop], np.diff(ends[: count + 1]))
        first += count


def _document_ends(shard: Shard, first: int, last: int) -> np.ndarray:
    """Where document `first` begins and where it and those up to `last - 1` end, in ids."""
    sequences = shard.document_index[first : last + 1]
    lengths = shard.lengths[sequences[0] : sequences[-1]].astype(np.int64)
    begin = int(shard.offsets[sequences[0]]) // shard.dtype.itemsize
    ends = begin + np.append(0, np.cumsum(lengths))[sequences - sequences[0]]
    if (np.diff(ends) < 0).any() or not 0 <= begin <= ends[-1] <= shard.num_tokens:
        raise DataError(f"{shard.idx} is damaged: documents {first} to {last} lie outside of it; verify the data set.")
    return ends
