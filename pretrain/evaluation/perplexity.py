"""Perplexity the way WikiText is measured: per token, per word and per byte, and bits per byte.

Every document is scored on its own, after one END_OF_DOCUMENT token, in the rolling windows of
`likelihood.split_windows`. With L the summed log-likelihood (nats) of all tokens:

    token perplexity = exp(-L / tokens)      word perplexity = exp(-L / words)
    byte perplexity  = exp(-L / bytes)       bits per byte   = -L / (bytes ln 2)

Words are separated by white space, bytes are UTF-8. Word, byte and bit figures do not depend on the tokenizer if its
tokens hold the whole text. If they do not (an unknown token, a normalisation), these figures would divide the
likelihood of a part by the size of the whole, and are NaN. Token perplexity compares only between models with the same
tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from data_prep.tokenizers.lost_bytes import lost_bytes
from pretrain.evaluation.held_out import Document, text_identity
from pretrain.evaluation.likelihood import Scorer

Item = TypeVar("Item")
_TOTALS = ("tokens", "words", "bytes", "lost_bytes")
# Figures that divide by a size of the text, which the tokens have to hold.
NEED_WHOLE_TEXT = ("word_perplexity", "byte_perplexity", "bits_per_byte")


@dataclass(frozen=True)
class DocumentScore:
    """One document: summed log-likelihood in nats, what it is divided by, and UTF-8 bytes that no token holds."""

    log_likelihood: float
    tokens: int
    words: int
    bytes: int
    lost_bytes: int = 0


def perplexities(scores: Sequence[DocumentScore]) -> dict[str, float]:
    """The four figures over all documents together; NaN without a token, and those of `NEED_WHOLE_TEXT` where bytes are
    lost.

    Raises:
        ValueError: no documents, or none with a word.
    """
    nats = -math.fsum(score.log_likelihood for score in scores)
    tokens, words, size, lost = (sum(getattr(score, name) for score in scores) for name in _TOTALS)
    if not (words and size):
        raise ValueError("perplexity needs at least one document with a word in it.")
    figures = {
        "token_perplexity": _exp(nats / tokens) if tokens else math.nan,
        "word_perplexity": _exp(nats / words),
        "byte_perplexity": _exp(nats / size),
        "bits_per_byte": nats / size / math.log(2),
    }
    return figures if not lost else {**figures, **dict.fromkeys(NEED_WHOLE_TEXT, math.nan)}


def _exp(exponent: float) -> float:
    # Word perplexity of an untrained model can pass the largest float.
    return math.inf if exponent >= 700.0 else math.exp(exponent)


def jackknife(statistic: Callable[[Sequence[Item]], float], items: Sequence[Item]) -> float | None:
    """Standard error of `statistic(items)` by the delete-a-group jackknife (Kott 2001, "The delete-a-group jackknife").

    Items are dealt into at most 50 groups of nearly equal size; None when there are fewer than two items. For a mean
    with one item a group it is the textbook standard deviation / sqrt(n).
    """
    groups = min(50, len(items))
    if groups < 2:
        return None
    left_out = [statistic([item for i, item in enumerate(items) if i % groups != group]) for group in range(groups)]
    if not np.isfinite(left_out).all():
        return None
    return float(np.sqrt((groups - 1) / groups * np.square(np.asarray(left_out) - np.mean(left_out)).sum()))


def evaluate_perplexity(scorer: Scorer, tokenizer: Any, documents: Sequence[Document]) -> dict[str, Any]:
    """Perplexities of the documents that hold a word, with standard errors over documents, and what each document
    adds, so that two models can be compared document by document; with several sources, also of each source.

    Of the whole and of every source also: not_finite (documents without a finite likelihood), lost_bytes, text_bytes
    and text_sha256 of what was read.
    """
    documents = [document for document in documents if document.text.split()]
    texts = [document.text for document in documents]
    encoded = [list(ids) for ids in tokenizer.encode_batch(texts)]
    likelihood, _ = scorer.score([([scorer.eod_id], ids) for ids in encoded])
    scores = [
        DocumentScore(
            float(nats), len(ids), len(text.split()), len(text.encode("utf-8")), lost_bytes(tokenizer, text, ids)
        )
        for nats, ids, text in zip(likelihood, encoded, texts)
    ]
    scored = list(zip(documents, scores))
    sources = sorted({document.source for document in documents})
    by_source = {source: [pair for pair in scored if pair[0].source == source] for source in sources}
    return {
        **_summary(scored),
        "documents": {
            "nats": [-score.log_likelihood for score in scores],
            **{name: [getattr(score, name) for score in scores] for name in ("tokens", "words", "bytes")},
        },
        "sources": {source: _summary(part) for source, part in by_source.items()} if len(sources) > 1 else {},
    }


def _summary(scored: Sequence[tuple[Document, DocumentScore]]) -> dict[str, Any]:
    scores = [score for _, score in scored]
    totals = {name: sum(getattr(score, name) for score in scores) for name in _TOTALS}
    metrics = perplexities(scores)
    return {
        "metrics": metrics,
        "stderr": {name: jackknife(lambda part, name=name: perplexities(part)[name], scores) for name in metrics},  # type: ignore[misc]
        "n": len(scores),
        **totals,
        "scored_bytes": totals["bytes"],
        "not_finite": sum(not math.isfinite(score.log_likelihood) for score in scores),
        **text_identity([document.text for document, _ in scored]),
    }
