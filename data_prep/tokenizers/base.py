"""What a tokenizer is to the rest of the package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np


class Tokenizer(ABC):
    """Text to ids and back. No id is added in front or behind, and text never turns into a control token.

    kind: `sentencepiece`, `huggingface` or `tiktoken`. fingerprint: sha256 (hex) of what decides the ids. vocab_size:
    every id is below it. eod_id, eod_token: END_OF_DOCUMENT, put behind every document by the pipeline. unk_id: stands
    for text that has no ids of its own; None where all text has some. path: the file.
    """

    kind: str
    path: Path
    fingerprint: str
    vocab_size: int
    eod_id: int
    eod_token: str
    unk_id: int | None

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; control tokens appear by name where the tokenizer has one for them."""

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        return self.encode_batch([text])[0]

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts in one array, int32 `[ids]`, and where each text starts, int64 `[texts + 1]`."""
        lists = self.encode_batch(texts)
        starts = np.zeros(len(lists) + 1, np.int64)
        np.cumsum([len(ids) for ids in lists], out=starts[1:])
        flat = np.fromiter((token for ids in lists for token in ids), np.int32, int(starts[-1]))
        return flat, starts
