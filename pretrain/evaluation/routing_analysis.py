"""What the routers do with held-out text: how deep tokens go, which ones, and how much top-k gains by looking ahead.

Text is packed as in training: documents joined by END_OF_DOCUMENT and cut into full windows, which is what top-k
selection was trained on. The same windows are read with each routing. The difference of the two losses, causal minus
top-k, is the leak: how much lower the training-time loss is because top-k sees the future (or because the causal router
decides differently).
"""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from data_prep.tokenizers.lost_bytes import lost_bytes
from pretrain.errors import UserError
from pretrain.evaluation.held_out import text_identity
from pretrain.evaluation.likelihood import Scorer
from pretrain.evaluation.settings import ROUTINGS

TOKEN_CLASSES = ("end of document", "white space", "number", "punctuation", "word start", "word inside", "other")


@dataclasses.dataclass(frozen=True)
class Reading:
    """Windows read with one routing; arrays are (windows, T)."""

    losses: np.ndarray
    depths: np.ndarray


def pack(documents: Sequence[Sequence[int]], eod_id: int, length: int) -> np.ndarray:
    """Documents joined by END_OF_DOCUMENT, in windows (N, length+1) that share one token with the next.

    Tokens that do not fill a last window are left out; a text shorter than a window is one shorter window.
    """
    stream = np.asarray([token for document in documents for token in (*document, eod_id)], dtype=np.int64)
    length = min(length, len(stream) - 1)
    if length < 1:
        return np.empty((0, 2), dtype=np.int64)
    starts = np.arange(0, len(stream) - length, length)
    return np.stack([stream[start : start + length + 1] for start in starts])


def read_windows(scorer: Scorer, windows: np.ndarray) -> Reading:
    """Per-token losses (nats) and depths (recursion steps taken) of every window, computed by all ranks together."""

    def measure(rows: slice, sums: torch.Tensor) -> None:
        batch = torch.from_numpy(windows[rows]).to(scorer.device)
        out = scorer.forward(batch[:, :-1], labels_BT=batch[:, 1:], return_losses=True, return_routing=True)
        sums[0, rows] = out.losses_BT
        sums[1, rows] = scorer.model.config.recursions if out.routing is None else out.routing.depth_BT

    count, length = len(windows), windows.shape[1] - 1
    size = max(1, 2048 // length)
    batches = [slice(start, start + size) for start in range(0, count, size)]
    losses, depths = scorer.sum_over_ranks(batches, measure, (2, count, length))
    return Reading(losses, depths.astype(np.int64))


def evaluate_routing(scorer: Scorer, tokenizer: Any, texts: Sequence[str]) -> dict[str, Any]:
    """Depth histograms, depth per token class, and the loss under either routing.

    Returns:
        metrics (nats per token, recursion steps) and their standard errors over windows, depth_histogram by routing
        (share of tokens at 0, 1, ... R steps), loss_at_depth (causal), token_classes (causal: share of tokens, mean
        depth, mean loss of predicting what follows) and deepest_tokens; not_finite (windows without a finite loss),
        lost_bytes (where there are any, bits_per_byte is NaN), text_bytes and text_sha256.

    Raises:
        UserError: the tokenizer makes no token of the texts.
    """
    config = scorer.model.config
    encoded = [list(ids) for ids in tokenizer.encode_batch(list(texts))]
    lost = sum(lost_bytes(tokenizer, text, ids) for text, ids in zip(texts, encoded))
    windows = pack(encoded, scorer.eod_id, scorer.max_length)
    if not len(windows):
        raise UserError("routing: the tokenizer makes no token of the held-out text, so there is nothing to route.")
    routed = config.router is not None
    readings = {
        routing: read_windows(dataclasses.replace(scorer, routing=routing), windows)
        for routing in (ROUTINGS if routed else ROUTINGS[:1])
    }
    causal = readings["causal"]
    per_window = {f"loss_{name}": reading.losses.mean(axis=1) for name, reading in readings.items()}
    per_window |= {f"mean_depth_{name}": reading.depths.mean(axis=1) for name, reading in readings.items()}
    if routed:
        per_window["leak"] = per_window["loss_causal"] - per_window["loss_topk"]
    metrics = {name: float(values.mean()) for name, values in per_window.items()}
    # Predicting END_OF_DOCUMENT costs nats but spells no bytes.
    spelled = [tokenizer.decode([int(token) for token in row if token != scorer.eod_id]) for row in windows[:, 1:]]
    size = max(1, sum(len(text.encode("utf-8")) for text in spelled))
    metrics["bits_per_byte"] = math.nan if lost else float(causal.losses.sum() / size / math.log(2))
    finite = np.isfinite([values for name, values in per_window.items() if name.startswith("loss_")]).all(axis=0)
    text = text_identity(texts)
    stderr = {
        name: float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
        for name, values in per_window.items()
    }
    return {
        "metrics": metrics,
        "stderr": stderr,
        "n": len(windows),
        "not_finite": int((~finite).sum()),
        "lost_bytes": lost,
        "scored_bytes": text["text_bytes"],
        **text,
        "tokens": int(windows[:, 1:].size),
        "recursions": config.recursions,
        "routed": routed,
        "depth_histogram": {
            name: (np.bincount(reading.depths.ravel(), minlength=config.recursions + 1) / reading.depths.size).tolist()
            for name, reading in readings.items()
        },
        "loss_at_depth": [
            float(chosen.mean()) if (chosen := causal.losses[causal.depths == depth]).size else None
            for depth in range(config.recursions + 1)
        ],
        **_by_token(causal, windows[:, :-1], scorer.eod_id, tokenizer),
    }


def token_class(text: str) -> str:
    """One of `TOKEN_CLASSES` for the text a token stands for, leading space included."""
    bare = text.strip()
    if not bare:
        return "white space"
    if "\ufffd" in bare:
        return "other"
    if all(character.isnumeric() for character in bare):
        return "number"
    if all(unicodedata.category(character)[0] in "PS" for character in bare):
        return "punctuation"
    if any(character.isalpha() for character in bare):
        return "word start" if text[0].isspace() else "word inside"
    return "other"


def _by_token(reading: Reading, inputs: np.ndarray, eod_id: int, tokenizer: Any) -> dict[str, Any]:
    ids, inverse = np.unique(inputs, return_inverse=True)
    inverse = inverse.reshape(-1)
    # Decoded alone, a token loses the space it begins with; after another one it keeps it.
    anchor = list(tokenizer.encode("a"))[-1:]
    begin = len(tokenizer.decode(anchor))
    spellings = [tokenizer.decode([*anchor, int(token)])[begin:] if token != eod_id else "" for token in ids]
    classes = [
        "end of document" if token == eod_id else token_class(text) for token, text in zip(ids.tolist(), spellings)
    ]
    class_of = np.asarray([TOKEN_CLASSES.index(name) for name in classes])[inverse]
    depths, losses = reading.depths.ravel(), reading.losses.ravel()
    table = {}
    for number, name in enumerate(TOKEN_CLASSES):
        chosen = class_of == number
        if chosen.any():
            table[name] = {
                "share": float(chosen.mean()),
                "mean_depth": float(depths[chosen].mean()),
                "loss": float(losses[chosen].mean()),
            }
    counts = np.bincount(inverse)
    means = np.bincount(inverse, weights=depths) / counts
    frequent = [index for index in np.argsort(-means, kind="stable") if counts[index] >= 20]
    deepest = [
        {"token": spellings[i], "id": int(ids[i]), "count": int(counts[i]), "mean_depth": float(means[i])}
        for i in frequent[:20]
    ]
    return {"token_classes": table, "deepest_tokens": deepest}
