"""A look at the user's own documents before the work begins: a sample of them, and what the tokenizer loses of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.engine import Engine
from data_prep.errors import DataError
from data_prep.sources import Document, Group, LargeDocument, ReadOptions, expected_bytes, reader_for

_GROUPS = 8
# Characters of the sample, in all: a small share of the corpus, for the reference tokenizer is slow.
_LEAST, _MOST, _SHARE = 1 << 17, 1 << 19, 512
_LONGEST = 1 << 16  # of a longer document, only its beginning


def sample_documents(groups: Sequence[Group], options: ReadOptions, scratch: Path) -> list[str]:
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
            reader = reader_for(group, options, scratch)
            for item in islice(reader.items(0), 1000):
                if isinstance(item, Document):
                    texts.append(item.text[:_LONGEST])
                    left -= len(texts[-1])
                    if left <= 0:
                        break
                elif isinstance(item, LargeDocument) and item.temporary:
                    item.path.unlink(missing_ok=True)
            reader.close()
        except DataError:
            continue  # the run itself meets it, counts it and names it
    return texts


def round_trip(engine: Engine, texts: Sequence[str]) -> dict[str, Any]:
    """How many of `texts` come back from `decode(encode(text))`, and how far off the others are.

    Returns:
        documents, exact, characters, words, tokens, changed_characters (outside the longest common head and tail), and
        an example.
    """
    names = ("documents", "exact", "characters", "words", "tokens", "changed_characters")
    result: dict[str, Any] = dict.fromkeys(names, 0)
    result["documents"] = len(texts)
    for text in texts:
        result["characters"] += len(text)
        try:
            ids = engine.encode([text])[0].tolist()
        except UnicodeEncodeError:
            continue
        result["words"] += len(text.split())
        result["tokens"] += len(ids)
        back = engine.tokenizer.decode(ids)
        if back == text:
            result["exact"] += 1
            continue
        head, changed = _difference(text, back)
        result["changed_characters"] += changed
        if "example" not in result:
            result["example"] = {"text": text[head : head + 40], "decoded": back[head : head + 40]}
    return result


def describe_round_trip(result: dict[str, Any]) -> str:
    """One sentence for a person; empty when nothing is lost."""
    lost = result.get("documents", 0) - result.get("exact", 0)
    if not lost:
        return ""
    example = result.get("example", {})
    return (
        f"the tokenizer does not keep the text of {lost} of {result['documents']} sampled documents "
        f"({result['changed_characters']:,} of {result['characters']:,} characters change; for example "
        f"{example.get('text', '')!r} becomes {example.get('decoded', '')!r})."
    )


def _difference(one: str, other: str) -> tuple[int, int]:
    """Length of the common head, and how many characters of `one` change, line by line."""
    head = next((n for n, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    ours, theirs = one.splitlines(keepends=True), other.splitlines(keepends=True)
    if len(ours) == len(theirs):
        return head, sum(_middle(a, b) for a, b in zip(ours, theirs) if a != b)
    return head, _middle(one, other)


def _middle(one: str, other: str) -> int:
    head = next((n for n, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    shorter = min(len(one), len(other)) - head
    tail = next((n for n in range(shorter) if one[-1 - n] != other[-1 - n]), shorter)
    return max(len(one), len(other)) - head - tail
