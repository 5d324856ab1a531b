"""Several sources read as one stream of samples, in exact proportions, as a function of the sample number alone.

    mixture = Mixture(
        [MixtureSource("web", open_dataset("PILE").only("Pile-CC")), MixtureSource("books", open_dataset("BOOKS"))],
        length=2048,
        phases=[Phase(0, {"web": 0.9, "books": 0.1}), Phase(1_000_000, {"web": 0.5, "books": 0.5})],
        seed=1,
    )
    ids = mixture.batch(first_sample, 256)      # [256, 2049]

Which source gives sample n is decided on the way down a binary tree whose leaves are the sources: a node with the
integer weights (l, r) sends floor(n * l / (l + r)) of its first n samples to the left. Those counts are exact at any
n, so nothing has to be counted up to a sample, and a run resumed at any sample continues with the same ones.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count as counting
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from data_prep.errors import DataError
from data_prep.reading.dataset import TokenDataset
from data_prep.reading.sample_order import SampleOrder

if TYPE_CHECKING:
    from data_prep.reading.packed import PackedDataset

# Weights become integers that add up to this: rounding shifts a share by less than one sample in a billion, and
# products with the number of samples of a batch stay inside 64 bits.
_WHOLE = 1 << 30
_BLOCK = 512


@dataclass(frozen=True)
class MixtureSource:
    """A stream, packed or not, with the name that weights and counts go by."""

    name: str
    dataset: TokenDataset | PackedDataset


@dataclass(frozen=True)
class Phase:
    """Weights that hold from sample `first_sample` on; relative. A source that is not named gives nothing."""

    first_sample: int
    weights: Mapping[str, float]


@dataclass(frozen=True)
class _Leaf:
    source: int
    weight: int


@dataclass(frozen=True)
class _Node:
    left: _Node | _Leaf
    right: _Node | _Leaf
    weight: int


class Mixture:
    """Samples drawn from several sources by weight; each source in its own shuffled order, epoch after epoch.

    In any window of samples, each source has its share to within a few samples (the tests: 3 samples for 22 sources).

    Args:
        sources: streams of one tokenizer, with distinct names.
        length: inputs of a sequence; a sample has one id more.
        phases: weights and since when, the first from sample 0; see `Phase`.
        seed: of the sample orders.

    Attributes:
        eod_id, vocab_size, tokenizer_fingerprint: those of the sources, see `TokenDataset`.

    Raises:
        DataError: no source, names twice, different tokenizers or END_OF_DOCUMENT, a source shorter than one sequence,
            or weights that are negative, all zero, or of an unknown source.
    """

    def __init__(self, sources: Sequence[MixtureSource], length: int, phases: Sequence[Phase], seed: int) -> None:
        self.sources = tuple(sources)
        self.length, self.seed = length, seed
        self.phases = tuple(phases)
        names = [source.name for source in sources]
        _check_sources(self.sources, length)
        _check_phases(self.phases, names)
        first = sources[0].dataset
        self.eod_id, self.vocab_size = first.eod_id, first.vocab_size
        self.tokenizer_fingerprint = first.tokenizer_fingerprint
        self.sizes = [source.dataset.num_sequences(length) for source in sources]
        self._orders = [SampleOrder(size, seed, stream=name) for size, name in zip(self.sizes, names)]
        self._firsts = [phase.first_sample for phase in phases]
        self._trees = [_build_tree([phase.weights.get(name, 0.0) for name in names]) for phase in phases]
        # One sample alone costs as much as some hundred together, and samples are mostly asked for in order.
        self._blocks = lru_cache(maxsize=8)(lambda number: self.draw(number * _BLOCK, _BLOCK))
        self._drawn_before = [[0] * len(names)]  # by each source, when a phase begins
        for tree, begin, end in zip(self._trees, self._firsts, self._firsts[1:]):
            counts = list(self._drawn_before[-1])
            _add_counts(tree, end - begin, counts)
            self._drawn_before.append(counts)

    def __reduce__(self) -> tuple[type[Mixture], tuple[object, ...]]:
        return Mixture, (self.sources, self.length, self.phases, self.seed)

    def draw(self, first_sample: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the samples `first_sample` to `first_sample + count - 1` come from.

        Returns:
            Number of the source (in the order given) and of the sequence in it, int64 `[count]` each.
        """
        if first_sample < 0 or count < 0:
            raise IndexError(f"samples are counted from 0; got first_sample={first_sample}, count={count}")
        chosen = np.empty(count, np.int64)
        indexes = np.empty(count, np.int64)
        done = 0
        while done < count:
            sample = first_sample + done
            phase = bisect_right(self._firsts, sample) - 1
            end = self._firsts[phase + 1] if phase + 1 < len(self._firsts) else first_sample + count
            here = min(count - done, end - sample)
            positions = np.arange(done, done + here)
            self._descend(self._trees[phase], sample - self._firsts[phase], positions, phase, chosen, indexes)
            done += here
        return chosen, indexes

    def _descend(
        self,
        node: _Node | _Leaf,
        first: int,
        positions: np.ndarray,
        phase: int,
        chosen: np.ndarray,
        indexes: np.ndarray,
    ) -> None:
        """Distribute this node's samples `first ..`, which belong at `positions` of the batch, over its leaves."""
        if not positions.size:
            return
        if isinstance(node, _Leaf):
            chosen[positions] = node.source
            start = self._drawn_before[phase][node.source] + first
            indexes[positions] = self._orders[node.source].block(start, positions.size)
            return
        whole, part = node.weight, node.left.weight
        left_first, rest = divmod(first * part, whole)
        steps = (rest + np.arange(positions.size + 1, dtype=np.int64) * part) // whole
        goes_left = np.diff(steps) > 0
        self._descend(node.left, left_first, positions[goes_left], phase, chosen, indexes)
        self._descend(node.right, first - left_first, positions[~goes_left], phase, chosen, indexes)

    def batch(self, first_sample: int, count: int) -> np.ndarray:
        """Ids `[count, length + 1]` of the samples `first_sample` to `first_sample + count - 1`."""
        chosen, indexes = self.draw(first_sample, count)
        result = np.empty((count, self.length + 1), np.result_type(*(s.dataset.dtype for s in self.sources)))
        for row, source, index in zip(result, chosen.tolist(), indexes.tolist()):
            row[:] = self.sources[source].dataset.sequence(index, self.length)
        return result

    def sequence(self, sample: int) -> np.ndarray:
        """Ids `[length + 1]` of one sample, a read-only view where its data set gives one."""
        if sample < 0:
            raise IndexError(f"samples are counted from 0; got {sample}")
        chosen, indexes = self._blocks(sample // _BLOCK)
        source = self.sources[int(chosen[sample % _BLOCK])]
        return source.dataset.sequence(int(indexes[sample % _BLOCK]), self.length)

    def drawn(self, samples: int) -> dict[str, int]:
        """How many of the first `samples` samples each source gives."""
        phase = bisect_right(self._firsts, samples) - 1
        counts = list(self._drawn_before[phase])
        _add_counts(self._trees[phase], samples - self._firsts[phase], counts)
        return {source.name: count for source, count in zip(self.sources, counts)}

    def epochs(self, samples: int) -> dict[str, float]:
        """How often each source has been read after `samples` samples; 1.5 is half-way through its second epoch."""
        return {name: count / size for (name, count), size in zip(self.drawn(samples).items(), self.sizes)}


def _check_sources(sources: Sequence[MixtureSource], length: int) -> None:
    if not sources:
        raise DataError("a mixture needs at least one source; name a data set.")
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"two sources of the mixture are named '{name}'; give them different names.")
    first = sources[0]
    for source in sources:
        if source.dataset.tokenizer_fingerprint != first.dataset.tokenizer_fingerprint:
            raise DataError(
                f"'{source.name}' ({source.dataset.path}) and '{first.name}' ({first.dataset.path}) were written with "
                "different tokenizers; tokenize one of them again with the other's tokenizer."
            )
        if source.dataset.eod_id != first.dataset.eod_id:
            raise DataError(
                f"documents end with id {source.dataset.eod_id} in '{source.name}' ({source.dataset.path}) and with "
                f"{first.dataset.eod_id} in '{first.name}' ({first.dataset.path}); tokenize one of them again with the "
                "other's --eod."
            )
        if source.dataset.num_sequences(length) == 0:
            raise DataError(
                f"'{source.name}' ({source.dataset.path}) has {source.dataset.num_tokens} tokens, less than one "
                f"sequence of {length} and its last label; use shorter sequences or more text."
            )


def _check_phases(phases: Sequence[Phase], names: Sequence[str]) -> None:
    if not phases or phases[0].first_sample != 0:
        raise DataError("the first weights of a mixture must hold from sample 0 on.")
    for before, phase in pairwise(phases):
        if phase.first_sample <= before.first_sample:
            raise DataError(
                f"the weights of a mixture change at sample {phase.first_sample} after {before.first_sample}; "
                "list the changes in rising order."
            )
    for phase in phases:
        for name, weight in phase.weights.items():
            if name not in names:
                raise DataError(f"the mixture has a weight for '{name}', but its sources are {', '.join(names)}.")
            if not 0 <= weight < float("inf"):
                raise DataError(f"the weight of '{name}' is {weight}; weights are numbers from 0 up.")
        if not sum(phase.weights.values()) > 0:
            raise DataError(
                f"all weights of the mixture are 0 from sample {phase.first_sample} on; give one source some."
            )


def _build_tree(weights: Sequence[float]) -> _Node | _Leaf:
    """Huffman's tree over the sources with a weight: the heavier, the nearer to the root and the more evenly drawn."""
    total = float(sum(weights))
    whole = [round(weight / total * _WHOLE) for weight in weights]
    order = counting()  # decides between equal weights, so that the tree is the same everywhere
    heap: list[tuple[int, int, _Node | _Leaf]] = [
        (max(share, 1), next(order), _Leaf(number, max(share, 1)))
        for number, (share, weight) in enumerate(zip(whole, weights))
        if weight > 0
    ]
    heapq.heapify(heap)
    while len(heap) > 1:
        small, _, right = heapq.heappop(heap)
        large, _, left = heapq.heappop(heap)
        heapq.heappush(heap, (small + large, next(order), _Node(left, right, small + large)))
    return heap[0][2]


def _add_counts(node: _Node | _Leaf, samples: int, counts: list[int]) -> None:
    """Add to `counts` how many of the node's first `samples` samples each source gives."""
    if isinstance(node, _Leaf):
        counts[node.source] += samples
        return
    left = samples * node.left.weight // node.weight
    _add_counts(node.left, left, counts)
    _add_counts(node.right, samples - left, counts)
