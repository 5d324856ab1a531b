"""What a tokenizer is to the rest of the package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.errors import DataError
from data_prep.json_input import read_json
from data_prep.plain_text import plain
from data_prep.typed import Count

MOST_IDS = 1 << 31  # ids are stored as int32 at most


@dataclass(frozen=True)
class TokenizerInfo:
    """Which tokenizer wrote the shards.

    kind: `sentencepiece`, `huggingface` or `tiktoken`. fingerprint: sha256 of what decides ids (hex). vocab_size: every
    id is below it. eod_id: END_OF_DOCUMENT, the last token of every document. file: path of the copy, relative to the
    data set folder.
    """

    kind: str
    fingerprint: str
    vocab_size: Count
    eod_id: Count
    file: str


class Tokenizer(ABC):
    """Text to ids and back. No id is added in front or behind, and text never turns into a control token.

    kind, fingerprint, vocab_size, eod_id: as in `TokenizerInfo`. eod_token: name of END_OF_DOCUMENT, which the pipeline
    puts behind every document. unk_id: stands for text without ids of its own; None where all text has some.
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
        """Ids of each text; DataError where the tokenizer's library cannot encode one."""

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


def configured_eod(folder: Path) -> str:
    """The `eos_token` of the folder's `tokenizer_config.json`; empty where there is no such file, or none in it.

    Raises:
        DataError: the file cannot be read, or its eos_token is no token.
    """
    path = folder / "tokenizer_config.json"
    try:
        config = read_json(path)
    except FileNotFoundError:
        return ""
    if not isinstance(config, dict):
        raise DataError(f"{path}: expected an object with eos_token, found {_short(config)}.")
    found = config.get("eos_token")
    name = found.get("content") if isinstance(found, dict) else "" if found is None else found
    if not isinstance(name, str):
        raise DataError(f"{path}: eos_token must be the name of a token, found {_short(found)}.")
    return name


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Whatever a tokenizer library raises in the block, panics of Rust included, is a DataError that begins with `what`
    and says the library's reason.
    """
    try:
        yield
    except DataError:
        raise
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # of pyo3; it is no Exception, and can be imported nowhere
        if not panic and (not isinstance(error, Exception) or isinstance(error, MemoryError)):
            raise
        raise DataError(f"{what}: {_short(error)}.") from None


def _short(value: object) -> str:
    text = plain(value)
    return text if len(text) <= 200 else text[:200] + "..."
