"""Validation loss on a schedule: the same sequences every time, with causal routing (the headline) and with top-k
routing.

All ranks take part, each with its share; under ZeRO-3 every rank runs as many forward passes as every other, filling
up with sequences that do not count.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from pretrain.evaluation.settings import ROUTINGS
from pretrain.ranks.lockstep import Lockstep
from pretrain.training.batches import make_micro_batch

if TYPE_CHECKING:
    from data_prep.reading.dataset import TokenDataset


@dataclass(frozen=True)
class ValidationSet:
    """Sequences of one source, evenly spread over its validation text. Attributes: source: its name; dataset,
    indexes.
    """

    source: str
    dataset: TokenDataset
    indexes: tuple[int, ...]


def spread(available: int, wanted: int) -> tuple[int, ...]:
    """`wanted` of `available` indexes, evenly spaced; all of them when there are fewer."""
    count = min(available, wanted)
    return tuple(place * available // count for place in range(count))


class Validator:
    """Measures mean loss per label in nats over each validation set.

    Args:
        engine: DeepSpeed's; sets: what is measured; length: T; micro_batch: sequences per forward pass.
        routed: whether the network has a router; without one both routings are the same and one pass serves both.
        end_of_document: as for `BatchReader`.
        lockstep: what the ranks agree upon before every forward pass.
    """

    def __init__(
        self,
        engine: Any,
        sets: Sequence[ValidationSet],
        *,
        length: int,
        micro_batch: int,
        routed: bool,
        end_of_document: int | None,
        device: torch.device,
        lockstep: Lockstep,
    ) -> None:
        self._engine = engine
        self._sets = sets
        self._length = length
        self._micro_batch = micro_batch
        self._routed = routed
        self._end_of_document = end_of_document
        self._device = device
        self._lockstep = lockstep

    def run(self) -> list[dict[str, Any]]:
        """One record per validation set: source, loss_causal, loss_topk, tokens_evaluated, seconds. Collective."""
        self._engine.eval()
        try:
            with torch.no_grad(), self._lockstep.passes():
                return [self._measure(validation_set) for validation_set in self._sets]
        finally:
            self._engine.train()

    def _measure(self, validation_set: ValidationSet) -> dict[str, Any]:
        began = time.perf_counter()
        losses = {routing: self._mean_loss(validation_set, routing) for routing in ROUTINGS[: 2 if self._routed else 1]}
        return {
            "split": "validation",
            "source": validation_set.source,
            "loss_causal": losses["causal"],
            "loss_topk": losses.get("topk", losses["causal"]),
            "routing_default": "causal",
            "tokens_evaluated": len(validation_set.indexes) * self._length,
            "seconds": time.perf_counter() - began,
        }

    def _mean_loss(self, validation_set: ValidationSet, routing: str) -> float:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        indexes = validation_set.indexes
        per_round = world_size * self._micro_batch
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        for start in range(0, len(indexes), per_round):
            self._lockstep.meet()
            mine = indexes[start + rank * self._micro_batch : start + (rank + 1) * self._micro_batch]
            # A rank without sequences left runs one that does not count, because ZeRO-3 gathers weights from all ranks.
            rows = [validation_set.dataset.sequence(index, self._length) for index in mine or indexes[:1]]
            batch = make_micro_batch(rows, self._end_of_document)
            documents = batch.documents_BT.to(self._device) if batch.documents_BT is not None else None
            output = self._engine(
                batch.inputs_BT.to(self._device),
                batch.labels_BT.to(self._device),
                documents_BT=documents,
                routing=routing,
            )
            if mine:
                sums += torch.stack([output.lm_loss.double() * len(mine), sums.new_tensor(len(mine))])
        dist.all_reduce(sums)
        total, count = sums.tolist()
        return total / count
