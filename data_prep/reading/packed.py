"""Reading sequences that were packed best-fit: whole documents put together, and padding where nothing fits.

    data = PackedDataset(open_dataset("DATA"), 2048)     # written with --packing best-fit --sequence-length 2048
    window = data.sequence(0, 2048)              # 2049 ids as always; the rest of a sequence is END_OF_DOCUMENT
    wanted = ~is_padding(window, data.eod_id)[1:]        # labels that count

It has the interface of the data set it comes from, so it can be shuffled and mixed in the same way.

The sidecar of a shard is two arrays beside it, which can be mapped into memory:

    NAME.packing-<length>.pieces.npy        int64 [pieces, 2], first token in the shard and number of tokens
    NAME.packing-<length>.sequences.npy     int64 [sequences + 1], first piece of each sequence, and the end

A sequence has room for length + 1 tokens: `length` inputs and their labels.
"""

from __future__ import annotations

import math
import os
import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.errors import DataError
from data_prep.reading.dataset import TokenDataset

# As `np.save` writes it for whole numbers in one column or two.
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '<i8', 'fortran_order': False, 'shape': \((\d{1,15}),( 2)?\), \} *\n", re.DOTALL
)
_LONGEST_HEADER = 256
_MAPPINGS = 64  # each is three mapped files


@dataclass(frozen=True)
class Packing:
    """Which tokens of a shard make up which sequence.

    pieces: int64 `[pieces, 2]`, first token and number of tokens. sequences: int64 `[sequences + 1]`, first piece of
    each sequence. capacity: tokens a sequence has room for.
    """

    pieces: npt.NDArray[np.int64]
    sequences: npt.NDArray[np.int64]
    capacity: int

    def __len__(self) -> int:
        return len(self.sequences) - 1

    def of(self, sequence: int) -> npt.NDArray[np.int64]:
        """Pieces of one sequence, `[n, 2]`, in the order they lie in the shard."""
        return self.pieces[self.sequences[sequence] : self.sequences[sequence + 1]]


class PackedDataset:
    """The sequences of a stream as best-fit packing arranged them, `length` inputs and their labels each.

    Raises:
        DataError: the data set was not packed for this length, or a packing is damaged.
    """

    def __init__(self, dataset: TokenDataset, length: int) -> None:
        self.dataset, self.length = dataset, length
        self._starts = list(
            accumulate((len(read_packing(shard.prefix, length)) for shard in dataset.shards), initial=0)
        )
        self._mapped = lru_cache(maxsize=_MAPPINGS)(self._map)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dataset, name)

    def num_sequences(self, length: int) -> int:
        """Sequences of the packing; DataError for another length than it was made for."""
        if length != self.length:
            raise DataError(f"{self.dataset.path} was opened as packed for sequences of {self.length}, not {length}.")
        return self._starts[-1]

    def sequence(self, index: int, length: int) -> np.ndarray:
        """Ids `[length + 1]` of sequence `index`: its documents one after another, then END_OF_DOCUMENT as padding.

        Raises:
            IndexError: outside `0 .. num_sequences(length) - 1`.
            DataError: the packing points outside its shard.
        """
        count = self.num_sequences(length)
        if not 0 <= index < count:
            raise IndexError(f"sequence {index} of {count} (packed for {length}) in {self.dataset.path}")
        number = bisect_right(self._starts, index) - 1
        tokens, packing = self._mapped(number)
        result = np.full(length + 1, self.dataset.eod_id, tokens.dtype)
        filled = 0
        for start, size in packing.of(index - self._starts[number]).tolist():
            if not 0 < size <= length + 1 - filled or not 0 <= start <= tokens.size - size:
                raise DataError(
                    f"the packing of {self.dataset.shards[number].prefix} for length {length} is damaged: sequence "
                    f"{index - self._starts[number]} takes {size} tokens from {start}; pack the data set again."
                )
            result[filled : filled + size] = tokens[start : start + size]
            filled += size
        return result

    def batch(self, indexes: Iterable[int], length: int) -> np.ndarray:
        """Ids `[len(indexes), length + 1]` of several sequences."""
        rows = [self.sequence(int(index), length) for index in indexes]
        return np.stack(rows) if rows else np.empty((0, length + 1), self.dataset.dtype)

    def only(self, source: str) -> PackedDataset:
        """The sequences of one source alone; DataError when there is none of that name."""
        return PackedDataset(self.dataset.only(source), self.length)

    def _map(self, number: int) -> tuple[np.ndarray, Packing]:
        shard = self.dataset.shards[number]
        return shard.map_tokens(), read_packing(shard.prefix, self.length)

    def __reduce__(self) -> tuple[type[PackedDataset], tuple[TokenDataset, int]]:
        return PackedDataset, (self.dataset, self.length)


def is_padding(tokens: npt.ArrayLike, eod_id: int) -> np.ndarray:
    """Which of the ids `[..., T]` are padding: END_OF_DOCUMENT after END_OF_DOCUMENT, as no document is empty; bool.

    An END_OF_DOCUMENT that is all that is left of a cut document counts as padding too: nothing in the sequence
    predicts it.
    """
    ends = np.asarray(tokens) == eod_id
    padding = np.zeros(ends.shape, bool)
    np.logical_and(ends[..., 1:], ends[..., :-1], out=padding[..., 1:])
    return padding


def read_packing(prefix: str | os.PathLike[str], length: int) -> Packing:
    """Map the sidecar of the shard `prefix` for `length`.

    Raises:
        DataError: there is none, or it is damaged.
    """
    try:
        pieces = _mapped(sidecar(prefix, length, "pieces"))
        sequences = _mapped(sidecar(prefix, length, "sequences"))
    except FileNotFoundError:
        raise DataError(
            f"{prefix} has no packing for length {length}; "
            f"write the data set with --packing best-fit --sequence-length {length}."
        ) from None
    if pieces.ndim != 2 or sequences.ndim != 1 or not len(sequences) or sequences[-1] != len(pieces):
        raise DataError(
            f"the packing of {prefix} for length {length} is damaged: its files do not belong together; pack it again."
        )
    return Packing(pieces, sequences, length + 1)


def _mapped(path: Path) -> npt.NDArray[np.int64]:
    """An array of a packing. `np.load` reads its header with Python's parser, which fails now and then where several
    threads use it at once (Python 3.11, CPython's issue 106905).
    """
    try:
        with path.open("rb") as stream:
            header = _HEADER.match(stream.read(_LONGEST_HEADER))
            if header is not None:
                shape = (int(header[1]), 2) if header[2] else (int(header[1]),)
                if stream.seek(0, os.SEEK_END) == header.end() + 8 * math.prod(shape):
                    return np.memmap(path, "<i8", "r", header.end(), shape)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    raise DataError(f"{path} is damaged; pack it again.")


def sidecar(prefix: str | os.PathLike[str], length: int, name: str) -> Path:
    """Path of one of the two arrays."""
    return Path(f"{os.fspath(prefix)}.packing-{length}.{name}.npy")
