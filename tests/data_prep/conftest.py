"""Small tokenizers, trained once for all tests with their own libraries."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data_prep.writing import small_byte_bpe, small_sentencepiece


@pytest.fixture(scope="session")
def byte_bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer.json of 400 entries; END_OF_DOCUMENT is <|endoftext|>."""
    return small_byte_bpe(tmp_path_factory.mktemp("byte_bpe") / "tokenizer.json")


@pytest.fixture
def tiktoken_encoding(monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiktoken encoding of single bytes, `th` and `the`, with two control tokens."""
    tiktoken = pytest.importorskip("tiktoken")
    encoding = {
        "name": "small",
        "pat_str": r"\w+|\W",
        "mergeable_ranks": {bytes([b]): b for b in range(256)} | {b"th": 256, b"the": 257},
        "special_tokens": {"<|endoftext|>": 258, "<|stop|>": 259},
    }
    monkeypatch.setattr(tiktoken.registry, "ENCODING_CONSTRUCTORS", {"small": lambda: encoding})
    return "tiktoken:small"


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model with Llama's settings (dummy prefix, byte fallback), 400 entries."""
    return small_sentencepiece(tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model")
