"""A small suite made from held-out text, in lm-evaluation-harness's task format, for machines without a network.

Three tasks, each a question about a passage that is in no training document:

    own_last_word     the last word of a passage, which it has used before (as in LAMBADA, Paperno et al. 2016)
    own_continuation  which of four pieces of text continues a passage; the others continue other passages
    own_word_order    a sentence against the same with two neighbouring words exchanged (a minimal pair, as in BLiMP,
                      Warstadt et al. 2020)

Questions depend on the documents alone, not on their order, the tokenizer or a random state.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from data_prep.files import atomic_write
from pretrain.evaluation.suites import TASKS

MOST_QUESTIONS = 500
MOST_BYTES = 4_000_000
_CONTEXT_WORDS, _PIECE_WORDS, _CHOICES = 32, 12, 4
_WORD = re.compile(r"[A-Za-z][a-z]*(?:['’-][a-z]+)*$")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"“])")

TASK_FILES = TASKS / "own"
CHANCE = {"own_last_word": 0.0, "own_continuation": 1.0 / _CHOICES, "own_word_order": 0.5}


def questions(texts: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """Records of every task, at most `MOST_QUESTIONS` each; a task may be empty when the text is too short for it."""
    ordered = sorted(set(texts), key=_key)
    paragraphs = [list(_paragraphs(text)) for text in ordered]
    return {
        "own_last_word": _in_turn(paragraphs, _last_word),
        "own_continuation": _continuations(_in_turn(paragraphs, _split_passage)),
        "own_word_order": _in_turn(paragraphs, _exchanged),
    }


def write_questions(folder: Path, made: dict[str, list[dict[str, Any]]]) -> dict[str, Path]:
    """Write `<task>.jsonl` for every task with questions; returns the files by task."""
    files = {}
    for name, records in made.items():
        if records:
            files[name] = folder / f"{name}.jsonl"
            with atomic_write(files[name]) as stream:
                stream.writelines(orjson.dumps(record) + b"\n" for record in records)
    return files


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()


def _choice(text: str, below: int) -> int:
    """A number in [0, below) that only the text decides."""
    return int.from_bytes(_key(text)[:8], "big") % below


def _paragraphs(text: str) -> Iterator[list[str]]:
    """Words of every paragraph that reads like prose: no code, no tables, mostly words."""
    for paragraph in re.split(r"\n\s*\n", text):
        words = paragraph.split()
        if len(words) < 8 or any(mark in paragraph for mark in (">>>", "::", "---", "===", "__", "{", "|")):
            continue
        plain = sum(bool(_WORD.match(word.strip(".,;:!?()\"'“”‘’"))) for word in words)
        if plain >= 0.85 * len(words):
            yield words


def _in_turn(
    documents: list[list[list[str]]], ask: Callable[[list[str]], Iterator[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Questions from each document in turn, so that no long document crowds out the others."""
    streams = [itertools.chain.from_iterable(map(ask, paragraphs)) for paragraphs in documents]
    rounds = itertools.chain.from_iterable(itertools.zip_longest(*streams))
    return list(itertools.islice((question for question in rounds if question is not None), MOST_QUESTIONS))


def _sentences(words: list[str]) -> list[list[str]]:
    return [sentence.split() for sentence in _SENTENCE_END.split(" ".join(words))]


def _last_word(words: list[str]) -> Iterator[dict[str, Any]]:
    passage: list[str] = []
    for sentence in _sentences(words):
        passage.extend(sentence)
        target = sentence[-1].rstrip(".!?")
        if len(passage) > 80:
            passage = []
        elif len(passage) >= 24 and len(target) >= 4 and _WORD.match(target) and target.islower():
            seen = {word.strip(".,;:!?()\"'") for word in passage[:-1]}
            if target in seen:
                yield {"context": " ".join(passage[:-1]), "target": target}
                passage = []


def _split_passage(words: list[str]) -> Iterator[dict[str, Any]]:
    length = _CONTEXT_WORDS + _PIECE_WORDS
    for start in range(0, len(words) - length + 1, length):
        middle = start + _CONTEXT_WORDS
        yield {"context": " ".join(words[start:middle]), "piece": " ".join(words[middle : start + length])}


def _continuations(passages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each passage with its own piece and those of three others, at a place among them that the passage decides."""
    made = []
    for number, passage in enumerate(passages):
        others = [passages[(number + offset) % len(passages)]["piece"] for offset in range(1, len(passages))]
        wrong = list(dict.fromkeys(piece for piece in others if piece != passage["piece"]))[: _CHOICES - 1]
        if len(wrong) < _CHOICES - 1:
            return []
        gold = _choice(passage["context"], _CHOICES)
        made.append(
            {"context": passage["context"], "choices": [*wrong[:gold], passage["piece"], *wrong[gold:]], "gold": gold}
        )
    return made


def _exchanged(words: list[str]) -> Iterator[dict[str, Any]]:
    for sentence in _sentences(words):
        places = [
            place
            for place in range(1, len(sentence) - 2)
            if sentence[place] != sentence[place + 1]
            and all(_WORD.match(w) and w.islower() for w in sentence[place : place + 2])
        ]
        if not 8 <= len(sentence) <= 30 or not places:
            continue
        place = places[_choice(" ".join(sentence), len(places))]
        swapped = [*sentence[:place], sentence[place + 1], sentence[place], *sentence[place + 2 :]]
        yield {"good": " ".join(sentence), "bad": " ".join(swapped)}
