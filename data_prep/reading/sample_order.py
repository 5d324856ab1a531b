"""The order in which sequences are read: a function of (seed, sample number), with nothing built, stored or replayed.

Within an epoch the order is a keyed permutation of `range(size)`: the generalized Feistel cipher of Black and Rogaway,
"Ciphers with Arbitrary Finite Domains" (CT-RSA 2002), section 5. A sequence number is written as a pair of digits
(left in Z_a, right in Z_b) with a*b just above `size`; each round adds a keyed hash of one digit to the other, and a
result outside `range(size)` is enciphered again (cycle walking) until it is inside. Every epoch has its own keys.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import numpy as np

from data_prep.errors import DataError

_ROUNDS = 12  # at 8, the orders of five sequences are visibly not equally likely; at 12 they are
_BLOCK = 512
_LARGEST = 2**62  # sums of two digits must fit 64 bits


class SampleOrder:
    """Which sequence is read as sample n.

    `order[n]` is the sequence of sample n; samples `size * e` to `size * (e + 1) - 1` are epoch e and contain every
    sequence once. Costs the same for any n and any size.

    Args:
        size: number of sequences, 1 to 2**62.
        seed: any integer; another seed is another order.
        stream: tells apart orders that share a seed, such as the sources of a mixture.

    Raises:
        DataError: `size` is not in range.
    """

    def __init__(self, size: int, seed: int, stream: str = "") -> None:
        if not 1 <= size <= _LARGEST:
            raise DataError(
                f"a sample order needs between 1 and 2**62 sequences, got {size}; "
                "is the data set smaller than one sequence of this length?"
            )
        self.size, self.seed, self.stream = size, seed, stream
        # Even, because with two odd digits every round, and so every order, would be an even permutation.
        self._left = 2 * (math.isqrt(size - 1) // 2 + 1)
        self._right = -(-size // self._left)
        self._keys = lru_cache(maxsize=4)(self._derive_keys)
        # One sample alone costs as much as some hundred together, and samples are mostly asked for in order.
        self._blocks = lru_cache(maxsize=8)(lambda number: self.block(number * _BLOCK, _BLOCK))

    def __getitem__(self, sample: int) -> int:
        """Sequence of sample number `sample` (0 and up; IndexError below)."""
        if sample < 0:
            raise IndexError(f"samples are counted from 0; got {sample}")
        return int(self._blocks(sample // _BLOCK)[sample % _BLOCK])

    def block(self, first: int, count: int) -> np.ndarray:
        """Sequences of the samples `first` to `first + count - 1`, int64 `[count]`."""
        if first < 0 or count < 0:
            raise IndexError(f"samples are counted from 0; got first={first}, count={count}")
        pieces = []
        while count:
            epoch, start = divmod(first, self.size)
            here = min(count, self.size - start)
            pieces.append(self._permute(np.arange(start, start + here, dtype=np.uint64), self._keys(epoch)))
            first += here
            count -= here
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def _derive_keys(self, epoch: int) -> np.ndarray:
        text = f"{self.seed}/{self.stream}/{epoch}".encode()
        return np.frombuffer(hashlib.shake_128(text).digest(8 * _ROUNDS), "<u8")

    def _permute(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        values = self._encipher(values, keys)
        outside = np.flatnonzero(values >= self.size)
        while outside.size:
            values[outside] = self._encipher(values[outside], keys)
            outside = outside[values[outside] >= self.size]
        return values.astype(np.int64)

    def _encipher(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        a, b = np.uint64(self._left), np.uint64(self._right)
        right, left = np.divmod(values, a)
        for number in range(0, _ROUNDS, 2):
            left = (left + _hash(right, keys[number]) % a) % a
            right = (right + _hash(left, keys[number + 1]) % b) % b
        return right * a + left

    def __reduce__(self) -> tuple[type[SampleOrder], tuple[int, int, str]]:
        return SampleOrder, (self.size, self.seed, self.stream)


def _hash(digits: np.ndarray, key: np.uint64) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea, Flood, OOPSLA 2014) over digit + key, modulo 2**64."""
    mixed = digits + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
