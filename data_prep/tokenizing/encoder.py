"""The encoder: an exact accelerator in front of the reference tokenizer, checked against it before it is trusted.

The reference is the tokenizer's own library. fastokens computes the same ids many times faster where it can load the
tokenizer; at start both encode a set of nasty strings and a sample of the user's documents, and on any
difference the reference is used. A text on which the accelerator fails goes to the reference alone.
"""

from __future__ import annotations

import importlib.metadata
import os
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import orjson
import tokenizers

from data_prep.errors import DataError
from data_prep.tokenizers.base import Tokenizer
from data_prep.tokenizers.conversion import as_tokenizer_json
from data_prep.tokenizers.huggingface import HuggingFaceTokenizer
from data_prep.tokenizers.sentencepiece_model import SentencePieceTokenizer
from data_prep.tokenizing.nasty import nasty_texts

REFERENCE = "reference"
FASTOKENS = "fastokens"
# fastokens with SmolLM's separate pass over digits folded into the word pattern.
FASTOKENS_DIGITS = "fastokens+digits"

_LIBRARIES = {"huggingface": "tokenizers", "sentencepiece": "sentencepiece", "tiktoken": "tiktoken"}
_REFERENCE_BATCH = 1 << 19  # characters the reference encodes at once; it holds ~200 bytes for every token

# GPT-2's word pattern with each digit a word of its own; white space in front of a digit counts as at the end. DIGITS
# stands for what the reference takes for a digit: its Unicode may be older than that of \p{N}.
_DIGITS_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|[DIGITS]| ?(?:(?![DIGITS])\p{N})+| ?[^\s\p{L}\p{N}DIGITS]+"
    r"|\s+(?![^\sDIGITS])|\s+"
)
# Unicode versions disagree whether U+180E is white space, so texts with it are left to the reference.
_DISPUTED = "\u180e"


class Engine:
    """Encodes parts of documents into one flat array of ids.

    Args:
        tokenizer: the reference.
        name: `reference`, `fastokens` or `fastokens+digits`.

    fallbacks: texts that the accelerator was not given, failed on, or made END_OF_DOCUMENT of.
    """

    def __init__(self, tokenizer: Tokenizer, name: str = REFERENCE) -> None:
        self.tokenizer, self.name = tokenizer, name
        self.fallbacks = 0
        self._fast: Any = None if name == REFERENCE else _load_fastokens(tokenizer, name)

    @cached_property
    def _lead(self) -> np.ndarray | None:
        """Ids of a newline, where the first word of a text gets another id than the same word behind a newline."""
        lead = self.tokenizer.encode("\n")
        prefixed = self.tokenizer.encode("\nword")[len(lead) :] != self.tokenizer.encode("word")
        return np.asarray(lead) if prefixed else None

    def encode(self, texts: Sequence[str], continued: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all `texts` in one array `[ids]` (uint32 or int32), and where each begins, `[texts + 1]`.

        `continued` names the texts that continue the one before them (see `data_prep.tokenizing.cutting`).

        Raises:
            DataError: a text became END_OF_DOCUMENT, which only the pipeline may put behind a document.
        """
        ids, starts = self._parts(texts, continued)
        if (ids == self.tokenizer.eod_id).any():
            number = int(np.searchsorted(starts, np.argmax(ids == self.tokenizer.eod_id), side="right")) - 1
            raise DataError(
                f"{self.tokenizer.path}: text becomes END_OF_DOCUMENT, {self.tokenizer.eod_token!r}, in the document "
                f"with {texts[number][:60]!r}; name another token with --eod, or use another tokenizer."
            )
        return ids, starts

    def _parts(self, texts: Sequence[str], continued: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        if not continued or self._lead is None:
            return self._encode(list(texts))
        # A tokenizer that puts a space in front of a text must not do so here: a newline, taken off again, prevents it.
        marked = set(continued)
        ids, starts = self._encode(["\n" + text if n in marked else text for n, text in enumerate(texts)])
        found = np.split(ids, starts[1:-1])
        for number in marked:
            if np.array_equal(found[number][: self._lead.size], self._lead):
                found[number] = found[number][self._lead.size :]
            else:
                found[number] = self._encode([texts[number]])[0]
        return _joined([(part, np.array([0, part.size])) for part in found])

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        return self._reference(texts) if self._fast is None else self._accelerated(texts)

    def _accelerated(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if self.name != FASTOKENS_DIGITS or not any(_DISPUTED in text for text in texts):
            try:
                data, starts = self._fast.encode_batch_flat(texts, split_special_tokens=True)
                ids = np.frombuffer(data, np.uint32)
                if not (ids == self.tokenizer.eod_id).any():
                    return ids, np.frombuffer(starts, np.int64)
            except BaseException as error:  # a panic in Rust is no Exception
                if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                    raise
        if len(texts) == 1:
            self.fallbacks += 1
            return self._reference(texts)
        # Halving finds the texts that are at fault and leaves the others to the accelerator.
        middle = len(texts) // 2
        return _joined([self._accelerated(texts[:middle]), self._accelerated(texts[middle:])])

    def _reference(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        batches: list[list[str]] = []
        size = _REFERENCE_BATCH
        for text in texts:
            if size >= _REFERENCE_BATCH:
                batches.append([])
                size = 0
            batches[-1].append(text)
            size += len(text)
        return _joined([self.tokenizer.encode_flat(batch) for batch in batches])


def choose_engine(tokenizer: Tokenizer, sample: Sequence[str]) -> tuple[Engine, dict[str, Any]]:
    """The fastest engine that agrees with the reference on the nasty texts and on `sample`, and a report about it.

    The second value goes into the manifest: name, library versions, texts compared, and why a faster one was refused.

    Raises:
        DataError: the reference makes END_OF_DOCUMENT of its name in a text, or cannot encode a text.
    """
    reference = Engine(tokenizer)
    end = tokenizer.eod_token
    named = [end, f"a{end}b{end}{end}", f" {end} {end}\n{end}"]
    if isinstance(tokenizer, HuggingFaceTokenizer):
        named += [f"a {token['content']} b" for token in tokenizer.content["added_tokens"]]
    reference.encode(named)
    texts = [*nasty_texts(), *named, *sample]
    report: dict[str, Any] = {"name": REFERENCE, "refused": {}}
    report["versions"] = {_LIBRARIES[tokenizer.kind]: importlib.metadata.version(_LIBRARIES[tokenizer.kind])}
    chosen = reference
    expected: tuple[np.ndarray, np.ndarray] | None = None
    for name in _accelerators(tokenizer):
        try:
            candidate = Engine(tokenizer, name)
        except _Unsuitable as why:
            if str(why):
                report["refused"][name] = str(why)
            continue
        expected = expected or reference.encode(texts)
        found = candidate.encode(texts)
        differences = count_differences(found, expected)
        if not differences:
            chosen = candidate
            report["name"] = name
            report["versions"]["fastokens"] = importlib.metadata.version("fastokens")
            report["compared"] = len(texts)
            break
        report["refused"][name] = f"{differences} of {len(texts)} texts gave other ids"
    chosen.fallbacks = 0
    return chosen, report


def first_choice(tokenizer: Tokenizer) -> Engine:
    """The engine `choose_engine` tries first, unchecked: for a process that loads it while another one checks."""
    for name in _accelerators(tokenizer):
        try:
            return Engine(tokenizer, name)
        except _Unsuitable:
            continue
    return Engine(tokenizer)


def _accelerators(tokenizer: Tokenizer) -> list[str]:
    return [] if tokenizer.kind == "tiktoken" else [FASTOKENS_DIGITS, FASTOKENS]


def count_differences(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> int:
    """How many texts have other ids in `one` than in `other`."""
    pairs = zip(np.split(one[0], one[1][1:-1]), np.split(other[0], other[1][1:-1]))
    return sum(not np.array_equal(a, b) for a, b in pairs)


class _Unsuitable(Exception):
    """Why an accelerator cannot be used; without a text where nobody need know."""


def _load_fastokens(tokenizer: Tokenizer, variant: str) -> Any:
    try:
        import fastokens
    except ImportError:
        raise _Unsuitable("fastokens is not installed (`pip install fastokens`)") from None
    if isinstance(tokenizer, SentencePieceTokenizer):
        converted = as_tokenizer_json(tokenizer.proto) if variant == FASTOKENS else None
        if converted is None:
            raise _Unsuitable  # not a plain BPE model with byte fallback
        content = converted
    else:
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        content = {**tokenizer.content, "truncation": None, "padding": None}
    if variant == FASTOKENS_DIGITS:
        folded = _fold_digits(content.get("pre_tokenizer") or {})
        if folded is None:
            raise _Unsuitable  # no digits to fold
        content["pre_tokenizer"] = folded
    # Its thread pool takes one thread for every processor it may run on; a worker needs one in all.
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    try:
        if allowed:
            os.sched_setaffinity(0, {min(allowed)})
        fast = fastokens.Tokenizer.from_json_str(orjson.dumps(content).decode())
        fast.encode_batch_flat(["one", "two"], split_special_tokens=True)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise _Unsuitable(f"fastokens cannot load this tokenizer: {error}") from None
    finally:
        if allowed:
            os.sched_setaffinity(0, allowed)
    return fast


def _fold_digits(pre_tokenizer: dict[str, Any]) -> dict[str, Any] | None:
    """`Digits, ByteLevel` as one split by pattern; None where the pre-tokenizer is another."""
    steps = pre_tokenizer.get("pretokenizers") or []
    if [step["type"] for step in steps] != ["Digits", "ByteLevel"]:
        return None
    digits, byte_level = steps
    if not digits["individual_digits"] or byte_level["add_prefix_space"] or not byte_level.get("use_regex", True):
        return None
    pattern = _DIGITS_PATTERN.replace("DIGITS", _reference_digits())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**byte_level, "use_regex": False}]}


def _reference_digits() -> str:
    """What the reference's pre-tokenizer takes for a digit, as ranges of a character class."""
    # Numbers, and what this Python's Unicode does not know yet; planes above the second hold no numbers.
    candidates = [c for c in map(chr, range(0x20000)) if unicodedata.category(c) in ("Nd", "Nl", "No", "Cn")]
    separate = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    pieces = separate.pre_tokenize_str("".join(f"{c}aa" for c in candidates))
    ranges: list[list[int]] = []
    for code in (ord(piece) for piece, _ in pieces if len(piece) == 1):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


def _joined(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and starts of texts that were encoded in several parts."""
    firsts = np.cumsum([0, *(ids.size for ids, _ in parts)])
    starts = [np.zeros(1, np.int64), *(starts[1:] + first for (_, starts), first in zip(parts, firsts))]
    return np.concatenate([ids for ids, _ in parts] or [np.zeros(0, np.int32)]), np.concatenate(starts)
