"""Validation loss: the same sequences every time, with causal routing (the headline) and with top-k routing.

All ranks take part, each with its share (`evaluation_ranks.sum_over_ranks`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pretrain.evaluation.evaluation_ranks import sum_over_ranks
from pretrain.evaluation.settings import ROUTINGS
from pretrain.ranks.lockstep import Lockstep
from pretrain.training.batches import make_micro_batch

if TYPE_CHECKING:
    from data_prep.reading.dataset import TokenDataset


@dataclass(frozen=True)
class ValidationSet:
    """Sequences of one source, evenly spread over its validation text."""

    source: str
    dataset: TokenDataset
    indexes: tuple[int, ...]


def spread(available: int, wanted: int) -> tuple[int, ...]:
    """`wanted` of `available` indexes, evenly spaced; all of them when there are fewer."""
    count = min(available, wanted)
    return tuple(place * available // count for place in range(count))


@dataclass(frozen=True)
class Validator:
    """Measures mean loss per label in nats over each validation set.

    Attributes:
        engine: DeepSpeed's; length: T; micro_batch: sequences per forward pass.
        routed: whether the network has a router; without one both routings are the same and one pass serves both.
        end_of_document: as for `BatchReader`.
    """

    engine: Any
    sets: Sequence[ValidationSet]
    length: int
    micro_batch: int
    routed: bool
    end_of_document: int | None
    device: torch.device
    lockstep: Lockstep

    def run(self) -> list[dict[str, Any]]:
        """One record per validation set. Collective."""
        return [self._measure(validation_set) for validation_set in self.sets]

    def _measure(self, validation_set: ValidationSet) -> dict[str, Any]:
        began = time.perf_counter()
        losses = {routing: self._mean_loss(validation_set, routing) for routing in ROUTINGS[: 2 if self.routed else 1]}
        return {
            "split": "validation",
            "source": validation_set.source,
            "loss_causal": losses["causal"],
            "loss_topk": losses.get("topk", losses["causal"]),
            "routing_default": "causal",
            "tokens_evaluated": len(validation_set.indexes) * self.length,
            "seconds": time.perf_counter() - began,
        }

    def _mean_loss(self, validation_set: ValidationSet, routing: str) -> float:
        def measure(indexes: tuple[int, ...], sums: torch.Tensor) -> None:
            rows = [validation_set.dataset.sequence(index, self.length) for index in indexes]
            batch = make_micro_batch(rows, self.end_of_document)
            documents = batch.documents_BT.to(self.device) if batch.documents_BT is not None else None
            inputs, labels = batch.inputs_BT.to(self.device), batch.labels_BT.to(self.device)
            output = self.engine(inputs, labels, documents_BT=documents, routing=routing)
            sums += torch.stack([output.lm_loss.double() * len(indexes), sums.new_tensor(len(indexes))])

        indexes, size = validation_set.indexes, self.micro_batch
        batches = [indexes[start : start + size] for start in range(0, len(indexes), size)]
        sums = sum_over_ranks(self.engine, batches, measure, (2,), device=self.device, lockstep=self.lockstep)
        total, count = sums.tolist()
        return total / count
