"""Which sequences a step trains on, and how they reach the ranks.

The batch of a step is a pure function of the seed and of the run's position, one integer: the number of the next
sample. It does not depend on the world size: the global batch is cut into micro-batches in order and dealt out to the
ranks in turn.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from data_prep.reading.dataset import document_ids
from data_prep.reading.mixture import Mixture
from data_prep.reading.packed import is_padding
from mor_model.loss import IGNORED_LABEL

SkipRanges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass sees on one rank.

    Attributes:
        inputs_BT, labels_BT: int64; labels are the inputs' successors.
        documents_BT: int64 number of each token's document within its sequence; None unless the network masks
            documents.
        valid_BT: False on padding; None where there is none.
        labelled: positions with a label; padding has none (-100).
    """

    inputs_BT: torch.Tensor
    labels_BT: torch.Tensor
    documents_BT: torch.Tensor | None
    valid_BT: torch.Tensor | None
    labelled: int

    def tensors(self) -> list[torch.Tensor]:
        """Those that are there."""
        found = (self.inputs_BT, self.labels_BT, self.documents_BT, self.valid_BT)
        return [tensor for tensor in found if tensor is not None]


@dataclass(frozen=True)
class StepBatch:
    """One optimiser step's data on one rank.

    Attributes:
        samples: numbers of the global batch, the same on all ranks; next_position: where the following step starts.
        micro_batches: this rank's share.
        copied: happens once they are on the device; None on a CPU.
    """

    samples: tuple[int, ...]
    next_position: int
    micro_batches: tuple[MicroBatch, ...]
    copied: torch.cuda.Event | None = None

    @property
    def labelled(self) -> int:
        """Positions with a label in this rank's share."""
        return sum(micro_batch.labelled for micro_batch in self.micro_batches)


def take_samples(position: int, count: int, skipped: SkipRanges) -> tuple[tuple[int, ...], int]:
    """The next `count` sample numbers from `position` on that are in no range of `skipped`, and the position after
    them.

    Args:
        skipped: ascending, disjoint ranges [first, last].
    """
    starts = [first for first, _ in skipped]
    numbers: list[int] = []
    while len(numbers) < count:
        index = bisect.bisect_right(starts, position) - 1
        if index >= 0 and position <= skipped[index][1]:
            position = skipped[index][1] + 1
            continue
        following = starts[index + 1] if index + 1 < len(starts) else position + count
        stop = min(following, position + count - len(numbers))
        numbers.extend(range(position, stop))
        position = stop
    return tuple(numbers), position


def merge_ranges(*groups: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """Ascending, disjoint ranges [first, last] that cover what any of the groups covers."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(range_ for group in groups for range_ in group):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return tuple(merged)


def rank_share(count: int, micro_batch: int, rank: int, world_size: int) -> list[range]:
    """Places within a global batch of `count` that `rank` trains on, one range per micro-batch.

    Micro-batch number i of the global batch goes to rank i modulo the world size.
    """
    return [range(start, start + micro_batch) for start in range(rank * micro_batch, count, world_size * micro_batch)]


class BatchReader:
    """Reads this rank's micro-batches and brings them to the device, a step ahead of the training loop in a thread."""

    def __init__(
        self,
        source: Mixture,
        *,
        micro_batch: int,
        rank: int,
        world_size: int,
        device: torch.device,
        end_of_document: int | None,
        padding: int | None = None,
    ) -> None:
        """`end_of_document` and `padding`: see `make_micro_batch`."""
        self._source = source
        self._micro_batch = micro_batch
        self._rank = rank
        self._world_size = world_size
        self._device = device
        self._end_of_document = end_of_document
        self._padding = padding
        # Copies have a stream of their own, so that they pass while the step before computes.
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[tuple[int, int, SkipRanges], Future[StepBatch]] | None = None

    def read(self, position: int, count: int, skipped: SkipRanges, next_count: int) -> StepBatch:
        """The batch of `count` samples from `position` on; starts reading the one after it, of `next_count` samples."""
        wanted = (position, count, skipped)
        if self._ahead is not None and self._ahead[0] == wanted:
            batch = self._ahead[1].result()
        else:
            batch = self._read(*wanted)
        following = (batch.next_position, next_count, skipped)
        self._ahead = (following, self._thread.submit(self._read, *following)) if next_count else None
        if batch.copied is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_event(batch.copied)
            for tensor in itertools.chain.from_iterable(micro.tensors() for micro in batch.micro_batches):
                tensor.record_stream(computing)  # its memory must not be given away while this stream may read it
        return batch

    def close(self) -> None:
        """End the reading thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _read(self, position: int, count: int, skipped: SkipRanges) -> StepBatch:
        samples, next_position = take_samples(position, count, skipped)
        micro_batches = []
        for places in rank_share(count, self._micro_batch, self._rank, self._world_size):
            rows = [self._source.sequence(samples[place]) for place in places]
            micro_batches.append(make_micro_batch(rows, self._end_of_document, self._padding))
        if self._copies is None:
            return StepBatch(samples, next_position, tuple(micro_batches))
        with torch.cuda.stream(self._copies):
            # From pinned memory, or the copy would wait for the device.
            there = [
                _map_tensors(micro, lambda tensor: tensor.pin_memory().to(self._device, non_blocking=True))
                for micro in micro_batches
            ]
            return StepBatch(samples, next_position, tuple(there), self._copies.record_event())


def make_micro_batch(rows: Sequence[np.ndarray], end_of_document: int | None, padding: int | None = None) -> MicroBatch:
    """Stack sequences of T+1 tokens into inputs and labels.

    Args:
        end_of_document: token that ends a document, to number documents by, where the network masks them; else None.
        padding: the same token where sequences are packed best-fit: where it follows itself it is padding
            (`data_prep.reading.packed.is_padding`), which is neither predicted nor routed; else None.
    """
    tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    documents = None
    if end_of_document is not None:
        documents = torch.from_numpy(document_ids(inputs.numpy(), end_of_document)).long()
    valid = None
    if padding is not None:
        filling = torch.from_numpy(is_padding(tokens.numpy(), padding))
        labels = labels.masked_fill(filling[:, 1:], IGNORED_LABEL)  # a copy: of one row, labels and inputs are views
        # What is left of a cut document may be its end alone: it looks like padding, but the next document follows it.
        valid = ~filling[:, :-1] | (labels != IGNORED_LABEL)
        valid = None if bool(valid.all()) else valid
    labelled = int((labels != IGNORED_LABEL).sum()) if padding is not None else labels.numel()
    return MicroBatch(inputs, labels, documents, valid, labelled)


def _map_tensors(batch: MicroBatch, change: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
    documents, valid = batch.documents_BT, batch.valid_BT
    return MicroBatch(
        change(batch.inputs_BT),
        change(batch.labels_BT),
        None if documents is None else change(documents),
        None if valid is None else change(valid),
        batch.labelled,
    )
