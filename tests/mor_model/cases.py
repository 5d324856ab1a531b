"""Small configurations and batches that the tests of this package share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mor_model.config import ModelConfig
from mor_model.model import RecursiveTransformer

SMALL: dict[str, Any] = {
    "vocab_size": 19,
    "hidden_size": 8,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 12,
    "context_length": 32,
    "init_std": 0.5,
}


def small_config(**fields: Any) -> ModelConfig:
    """A network of width 8; recursive (middle_cycle, R=3, one layer a step) unless told otherwise."""
    values = {**SMALL, "num_layers": 5, "sharing": "middle_cycle", "recursions": 3, **fields}
    return ModelConfig(**values)


def small_model(
    config: ModelConfig, activation_checkpointing: str = "none", seed: int = 0, **to: Any
) -> RecursiveTransformer:
    model = RecursiveTransformer(config, activation_checkpointing)
    model.initialize(seed)
    return model.to(**to) if to else model


def enlarged(config: ModelConfig, scale: float = 3.0, noise: float = 0.05) -> RecursiveTransformer:
    """A network in evaluation mode whose weights are large enough for a comparison of its outputs to mean something."""
    model = small_model(config, seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale).add_(torch.randn(parameter.shape, generator=generator), alpha=noise)
    return model.eval()


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Equal up to how fp32 rounds on its way through a network, which is another on every kind of CPU: up to 6e-6 of
    the largest value. A wrong epsilon in the norms makes 3e-3.
    """
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-4 * float(expected.detach().abs().max()))


@dataclass
class Batch:
    """ids and labels [B, T], and optionally which tokens are real and of which document."""

    ids: Tensor
    labels: Tensor
    valid: Tensor | None = None
    documents: Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        return {
            "input_ids_BT": self.ids,
            "labels_BT": self.labels,
            "valid_BT": self.valid,
            "documents_BT": self.documents,
        }

    def rows(self, first: int, last: int) -> Batch:
        cut = [None if x is None else x[first:last] for x in (self.ids, self.labels, self.valid, self.documents)]
        return Batch(*cut)  # type: ignore[arg-type]


def random_batch(
    config: ModelConfig,
    sequences: int = 2,
    length: int = 11,
    seed: int = 0,
    *,
    padded: bool = False,
    documents: bool | None = None,
    ignored: bool = False,
) -> Batch:
    """A batch of random ids; `padded` makes the sequences of different lengths, on either side."""
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randint(config.vocab_size, (sequences, length + 1), generator=generator)
    ids, labels = stream[:, :-1].contiguous(), stream[:, 1:].contiguous()
    valid = None
    if padded:
        valid = torch.ones(sequences, length, dtype=torch.bool)
        for b in range(sequences):
            missing = int(torch.randint(length, (), generator=generator))
            if b % 2:
                valid[b, :missing] = False
            else:
                valid[b, length - missing :] = False
        labels = labels.masked_fill(~valid, -100)
    if ignored:
        labels = labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.3, -100)
    numbers = None
    if documents if documents is not None else config.document_masking:
        starts = torch.rand(sequences, length, generator=generator) < 0.3
        numbers = starts.long().cumsum(1)
    return Batch(ids, labels, valid, numbers)
