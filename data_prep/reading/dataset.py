"""Reading a data set folder: sequences of any length out of memory-mapped shards.

    data = open_dataset("DATA", split="train")
    order = SampleOrder(data.num_sequences(2048), seed=1)
    window = data.sequence(order[0], 2048)        # 2049 ids: inputs window[:-1], labels window[1:]
    documents = document_ids(window[:-1], data.eod_id)    # for attention that stays inside documents

The tokens of a split are one stream, shard after shard; sequence i of length L is the window that begins at token
i * L and has one token more, the label of its last position. Opening reads the manifest and the ends of each index.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from data_prep.errors import DataError
from data_prep.files import sha256_file
from data_prep.reading.manifest import Manifest, read_manifest
from data_prep.reading.manifest import Shard as ShardEntry
from data_prep.reading.shards import Shard

# Every mapping holds a file descriptor, and there may be more shards than a process may open.
_MAPPINGS = 256


def open_dataset(
    path: str | os.PathLike[str],
    split: str = "train",
    verify: Literal["structure", "checksums"] = "structure",
    *,
    fingerprint: str | None = None,
) -> TokenDataset:
    """Open one split of a data set folder.

    Args:
        path: folder with a `manifest.json`.
        split: `train`, `validation` or `test`.
        verify: `structure` compares size, type and counts of every shard with the manifest, at the same cost for any
            size; `checksums` also reads every byte.
        fingerprint: of the tokenizer the caller will use; None takes any.

    Raises:
        DataError: the first fault found: a missing or damaged manifest, an unknown split, a missing, truncated or
            changed shard, or shards of another tokenizer.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if split not in manifest.splits:
        raise DataError(f"{folder} has no split '{split}'; it has {', '.join(manifest.splits) or 'none'}.")
    tokenizer = manifest.tokenizer
    if fingerprint is not None and fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"{folder} was written with another tokenizer ({tokenizer.kind}, vocabulary {tokenizer.vocab_size}, "
            f"fingerprint {tokenizer.fingerprint[:12]}) than this run's ({fingerprint[:12]}); "
            "tokenize the text again or change the run's tokenizer."
        )
    if not 0 <= tokenizer.eod_id < tokenizer.vocab_size or tokenizer.vocab_size - 1 > np.iinfo(manifest.dtype).max:
        raise DataError(
            f"{folder}: a vocabulary of {tokenizer.vocab_size} with END_OF_DOCUMENT {tokenizer.eod_id} does not fit "
            f"{manifest.dtype}; the manifest is damaged, write the data set again."
        )
    entries = manifest.splits[split].shards
    shards = [open_shard(folder, entry, manifest.dtype) for entry in entries]
    if verify == "checksums":
        _verify_checksums(folder, entries)
    elif verify != "structure":
        raise DataError(f"verify is 'structure' or 'checksums', not {verify!r}.")
    return TokenDataset(folder, split, manifest, entries, shards)


class TokenDataset:
    """The token stream of one split, or of one source in it. Made by `open_dataset`; can be pickled, shared by threads.

    Attributes:
        path: the data set folder.
        split: name of the split.
        manifest: the folder's manifest.
        shards: the shards of this stream, opened.
        num_tokens, num_documents, text_bytes: sums over the shards of this stream; tokens include END_OF_DOCUMENT.
        sources: names of the sources of this stream, in order of appearance.
        dtype: type of the ids, uint16 or int32. vocab_size: every id is below it.
        eod_id: END_OF_DOCUMENT, the last token of every document.
        tokenizer_fingerprint: sha256 (hex) of what decides ids. tokenizer_path: the tokenizer's copy in the folder.
    """

    def __init__(
        self,
        path: Path,
        split: str,
        manifest: Manifest,
        entries: Sequence[ShardEntry],
        shards: Sequence[Shard],
    ) -> None:
        self.path, self.split, self.manifest = path, split, manifest
        self._entries, self.shards = tuple(entries), tuple(shards)
        self._starts = list(accumulate((shard.num_tokens for shard in shards), initial=0))
        self.num_tokens = self._starts[-1]
        self.num_documents = sum(entry.documents for entry in entries)
        self.text_bytes = sum(entry.text_bytes for entry in entries)
        self.sources = list(dict.fromkeys(entry.source for entry in entries))
        tokenizer = manifest.tokenizer
        self.dtype = np.dtype(manifest.dtype)
        self.vocab_size, self.eod_id = tokenizer.vocab_size, tokenizer.eod_id
        self.tokenizer_fingerprint, self.tokenizer_path = tokenizer.fingerprint, path / tokenizer.file
        self._mapped = lru_cache(maxsize=_MAPPINGS)(lambda number: self.shards[number].map_tokens())

    @property
    def manifest_digest(self) -> str:
        """sha256 (hex) of everything in the manifest that decides what is read."""
        return self.manifest.digest()

    def only(self, source: str) -> TokenDataset:
        """The stream of one source (or Pile subset) alone.

        Raises:
            DataError: no shard of this split has that source.
        """
        chosen = [number for number, entry in enumerate(self._entries) if entry.source == source]
        if not chosen:
            raise DataError(
                f"{self.path} has no source '{source}' in {self.split}; it has {', '.join(self.sources) or 'none'}."
            )
        return TokenDataset(
            self.path,
            self.split,
            self.manifest,
            [self._entries[number] for number in chosen],
            [self.shards[number] for number in chosen],
        )

    def num_sequences(self, length: int) -> int:
        """Whole sequences of `length` inputs and as many labels; what is left, `length` tokens at most, is unused."""
        if length < 1:
            raise ValueError(f"a sequence has at least one token, got length {length}")
        return max(0, (self.num_tokens - 1) // length)

    def sequence(self, index: int, length: int) -> np.ndarray:
        """Ids `[length + 1]` of sequence `index`; its last id is the first of the next sequence.

        A read-only view of the mapped file, except where the window spans shards.

        Raises:
            IndexError: outside `0 .. num_sequences(length) - 1`.
        """
        count = self.num_sequences(length)
        if not 0 <= index < count:
            raise IndexError(f"sequence {index} of {count} (length {length}) in {self.path}, {self.split}")
        return self.window(index * length, length + 1)

    def window(self, start: int, count: int) -> np.ndarray:
        """Ids `[count]` of the stream from token `start` on; the caller keeps it inside `0 .. num_tokens`."""
        number = bisect_right(self._starts, start) - 1
        pieces = []
        while count:
            offset = start - self._starts[number]
            piece = self._mapped(number)[offset : offset + count]
            pieces.append(piece)
            start += piece.size
            count -= piece.size
            number += 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def batch(self, indexes: Iterable[int], length: int) -> np.ndarray:
        """Ids `[len(indexes), length + 1]` of several sequences, a copy."""
        chosen = list(indexes)
        result = np.empty((len(chosen), length + 1), self.dtype)
        for row, index in zip(result, chosen):
            row[:] = self.sequence(int(index), length)
        return result

    def __reduce__(self) -> tuple[type[TokenDataset], tuple[object, ...]]:
        return TokenDataset, (self.path, self.split, self.manifest, self._entries, self.shards)


def document_ids(tokens: npt.ArrayLike, eod_id: int) -> np.ndarray:
    """Number of the document that each token of `[..., T]` belongs to, from 0 in each window; int32.

    END_OF_DOCUMENT belongs to the document it ends, so the number rises after it.
    """
    ends = np.asarray(tokens) == eod_id
    numbers = np.zeros(ends.shape, np.int32)
    np.cumsum(ends[..., :-1], axis=-1, dtype=np.int32, out=numbers[..., 1:])
    return numbers


def open_shard(folder: Path, entry: ShardEntry, dtype: str) -> Shard:
    """The shard of a manifest's entry; DataError when its files or counts are not what the manifest says."""
    shard = Shard(folder / entry.name)
    for what, found, expected in (
        ("ids of type", shard.dtype.name, dtype),
        ("tokens", shard.num_tokens, entry.tokens),
        ("documents", shard.num_documents, entry.documents),
    ):
        if found != expected:
            raise DataError(
                f"{shard.prefix} has {what} {found} where the manifest says {expected}; "
                "shard and manifest are of different runs: copy the folder again or rebuild it."
            )
    return shard


def _verify_checksums(folder: Path, entries: Sequence[ShardEntry]) -> None:
    expected = {
        folder / f"{entry.name}.{kind}": digest
        for entry in entries
        for kind, digest in (("bin", entry.sha256_bin), ("idx", entry.sha256_idx))
    }
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for path, found in zip(expected, pool.map(sha256_file, expected)):
            if found != expected[path]:
                raise DataError(
                    f"{path} has changed since it was written (sha256 {found[:12]}, where the manifest says "
                    f"{expected[path][:12]}); copy it again or rebuild the data set."
                )
