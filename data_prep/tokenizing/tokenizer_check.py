"""A look at the user's own documents before the work begins: a sample of them, and what the tokenizer loses of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from data_prep.errors import DataError
from data_prep.sources.base import Document, Group, ReadOptions
from data_prep.sources.groups import expected_bytes, reader_for
from data_prep.tokenizers.lost_bytes import lost_bytes
from data_prep.tokenizing.encoder import Engine

_GROUPS = 8
# Characters of the sample, in all: a small share of the corpus, for the reference tokenizer is slow.
_LEAST, _MOST, _SHARE = 1 << 17, 1 << 19, 512
_LONGEST = 1 << 16  # of a longer document, only its beginning


def sample_documents(groups: Sequence[Group], options: ReadOptions) -> list[str]:
    """The first documents of up to eight groups, spread over all of them: one character in 512 of the corpus, but no
    less than 130,000 and no more than half a million.
    """
    step = max(1, -(-len(groups) // _GROUPS))
    chosen = list(groups)[::step]
    texts: list[str] = []
    corpus = sum(map(expected_bytes, groups))
    wanted = min(max(corpus // _SHARE, _LEAST), _MOST) if corpus else _MOST
    for group in chosen:
        left = wanted // len(chosen)
        try:
            reader = reader_for(group, options)
            for item in islice(reader.items(0), 1000):
                if isinstance(item, Document):
                    texts.append(item.text[:_LONGEST])
                    left -= len(texts[-1])
                    if left <= 0:
                        break
            reader.close()
        except DataError:
            continue  # the run itself counts and reports it
    return texts


def round_trip(engine: Engine, texts: Sequence[str]) -> dict[str, Any]:
    """How many of `texts` come back from `decode(encode(text))`, and how many of their bytes the ids do not hold.

    Returns:
        documents, exact, bytes, words, tokens, lost_bytes (see `data_prep.tokenizers.lost_bytes`), and an example.
    """
    result: dict[str, Any] = dict.fromkeys(("documents", "exact", "bytes", "words", "tokens", "lost_bytes"), 0)
    result["documents"] = len(texts)
    for text in texts:
        ids = engine.encode([text])[0].tolist()
        result["bytes"] += len(text.encode("utf-8"))
        result["words"] += len(text.split())
        result["tokens"] += len(ids)
        back = engine.tokenizer.decode(ids)
        if back == text:
            result["exact"] += 1
            continue
        result["lost_bytes"] += lost_bytes(engine.tokenizer, text, ids)
        if "example" not in result:
            head = next((n for n, (a, b) in enumerate(zip(text, back)) if a != b), min(len(text), len(back)))
            result["example"] = {"text": text[head : head + 40], "decoded": back[head : head + 40]}
    return result


def describe_round_trip(result: dict[str, Any]) -> str:
    """One sentence for the user; empty when nothing is lost."""
    changed = result.get("documents", 0) - result.get("exact", 0)
    if not changed:
        return ""
    example = result.get("example", {})
    return (
        f"the tokenizer does not keep the text of {changed} of {result['documents']} sampled documents "
        f"({result.get('lost_bytes', 0):,} of {result.get('bytes', 0):,} bytes are lost; for example "
        f"{example.get('text', '')!r} becomes {example.get('decoded', '')!r})."
    )
