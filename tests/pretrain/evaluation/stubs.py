"""A network and a tokenizer whose likelihoods can be worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from mor_model.outputs import ModelOutput, Routing
from pretrain.evaluation.harness import run_tasks
from pretrain.evaluation.likelihood import Scorer
from pretrain.evaluation.lm_adapter import HarnessModel
from pretrain.evaluation.task_files import TaskPlan, local_task_file

EOD = 256
VOCABULARY = 257


class ByteTokenizer:
    """One token a byte; END_OF_DOCUMENT is 256."""

    eod_id = EOD
    vocab_size = VOCABULARY
    fingerprint = "bytes"
    unk_id = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i != EOD).decode("utf-8", errors="replace")


class Lossy(ByteTokenizer):
    """Every byte that is not ASCII becomes `?`, its unknown token."""

    unk_id = ord("?")

    def encode(self, text: str) -> list[int]:
        return [byte if byte < 128 else self.unk_id for byte in text.encode()]


class BigramModel(nn.Module):
    """P(next | current) from a fixed random table; losses under top-k routing are half of that.

    Depth is 1 + (token mod R); every call is recorded as (routing, depth, shape).
    """

    def __init__(self, seed: int = 0, context_length: int = 16, recursions: int = 3, routed: bool = True) -> None:
        super().__init__()
        table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2
        self.table = nn.Parameter(table)
        self.config = SimpleNamespace(
            vocab_size=VOCABULARY,
            context_length=context_length,
            recursions=recursions,
            router=object() if routed else None,
            document_masking=False,
        )
        self.calls: list[tuple[str, int | None, tuple[int, int]]] = []

    def forward(
        self,
        inputs,
        labels_BT=None,
        *,
        valid_BT=None,
        documents_BT=None,
        routing="topk",
        depth=None,
        return_logits=False,
        return_losses=False,
        return_routing=False,
    ):
        assert inputs.shape[1] <= self.config.context_length
        assert not self.training
        self.calls.append((routing, depth, tuple(inputs.shape)))
        logits = self.table[inputs]
        if valid_BT is not None:
            logits = logits.masked_fill(~valid_BT[..., None], math.nan)
        if labels_BT is None:
            return ModelOutput(None, None, None, logits, {}, {}, None)
        losses = -torch.log_softmax(logits, -1).gather(-1, labels_BT[..., None])[..., 0]
        if routing == "topk":
            losses = losses / 2
        value = Routing(1 + inputs % self.config.recursions, ()) if self.config.router is not None else None
        return ModelOutput(losses.mean(), losses.mean(), losses, None, {}, {}, value)


def log_probabilities(model: BigramModel) -> np.ndarray:
    """The table's log-probabilities in float64."""
    table = model.table.detach().double().numpy()
    return table - np.log(np.exp(table).sum(axis=1, keepdims=True))


def by_hand(model: BigramModel, tokens: list[int], first: int = 1) -> float:
    """Log-likelihood of tokens[first:], each given the one before."""
    table = log_probabilities(model)
    return math.fsum(float(table[a, b]) for a, b in zip(tokens[first - 1 :], tokens[first:]))


def ask(
    folder: Path, model: BigramModel, records: list[dict], task: str, tokenizer: ByteTokenizer | None = None
) -> dict:
    """One task over `records`, through the harness."""
    (folder / "asked.yaml").write_text(f"task: asked\n{task}")
    (folder / "asked.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = local_task_file(folder / "asked.yaml", {"test": folder / "asked.jsonl"}, {"task": "asked"})
    return run_tasks(HarnessModel(Scorer(model, EOD), tokenizer or ByteTokenizer()), TaskPlan({"asked": text}))["asked"]
