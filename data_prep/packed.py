"""Reading sequences that were packed best-fit: whole documents put together, and padding where nothing fits.

    data = open_dataset("DATA").packed(2048)     # written with --packing best-fit --sequence-length 2048
    window = data.sequence(0, 2048)              # 2049 ids as always; the rest of a sequence is END_OF_DOCUMENT
    wanted = ~data.is_padding(window)[1:]        # labels that count

It has the interface of the data set it comes from, so it can be shuffled and mixed in the same way.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from data_prep.errors import DataError
from data_prep.packing import Packing, read_packing
from data_prep.shards import Shard

if TYPE_CHECKING:
    from data_prep.dataset import TokenDataset

_MAPPINGS = 64  # each is three mapped files


class PackedDataset:
    """The sequences of a stream as its packing arranges them. Made by `TokenDataset.packed`.

    Raises:
        DataError: the data set was not packed for this length, or a packing is damaged.
    """

    def __init__(self, dataset: TokenDataset, shards: Iterable[Shard], length: int) -> None:
        self.dataset, self.length = dataset, length
        self._shards = tuple(shards)
        self._starts = list(accumulate((len(self._packing(shard)) for shard in self._shards), initial=0))
        self._mapped = lru_cache(maxsize=_MAPPINGS)(self._map)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "dataset":
            raise AttributeError(name)
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
                    f"the packing of {self._shards[number].prefix} for length {length} is damaged: sequence "
                    f"{index - self._starts[number]} takes {size} tokens from {start}; pack the data set again."
                )
            result[filled : filled + size] = tokens[start : start + size]
            filled += size
        return result

    def batch(self, indexes: Iterable[int], length: int) -> np.ndarray:
        """Ids `[len(indexes), length + 1]` of several sequences."""
        rows = [self.sequence(int(index), length) for index in indexes]
        return np.stack(rows) if rows else np.empty((0, length + 1), self.dataset.dtype)

    def is_padding(self, tokens: npt.ArrayLike) -> np.ndarray:
        """Which of the ids `[..., T]` are padding: END_OF_DOCUMENT behind END_OF_DOCUMENT, as no document is empty.

        So is an END_OF_DOCUMENT that is all that is left of a cut document: nothing in the sequence predicts it.
        """
        ends = np.asarray(tokens) == self.dataset.eod_id
        padding = np.zeros(ends.shape, bool)
        np.logical_and(ends[..., 1:], ends[..., :-1], out=padding[..., 1:])
        return padding

    def only(self, source: str) -> PackedDataset:
        """The sequences of one source alone; DataError when there is none of that name."""
        return self.dataset.only(source).packed(self.length)

    def _packing(self, shard: Shard) -> Packing:
        return read_packing(shard.prefix, self.length)

    def _map(self, number: int) -> tuple[np.ndarray, Packing]:
        shard = self._shards[number]
        return shard.map_tokens(), self._packing(shard)

    def __getstate__(self) -> tuple[TokenDataset, tuple[Shard, ...], int]:
        return self.dataset, self._shards, self.length

    def __setstate__(self, state: tuple[TokenDataset, tuple[Shard, ...], int]) -> None:
        self.__init__(*state)  # type: ignore[misc]
