"""Hugging Face `tokenizer.json` files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from data_prep.errors import DataError
from data_prep.tokenizers.base import Tokenizer

# Looked for in this order when nothing names the token.
_EOD_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[SEP]")


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`. END_OF_DOCUMENT is the token named, the `eos_token` of the `tokenizer_config.json` beside it,
    or the first of the usual names that exists.

    Raises:
        DataError: not such a file, or no END_OF_DOCUMENT in it.
    """

    kind = "huggingface"

    def __init__(self, path: Path, eod_token: str = "") -> None:
        self.path = path
        try:
            self.text = path.read_text(encoding="utf-8")
            content = json.loads(self.text)
            self._tokenizer = tokenizers.Tokenizer.from_str(self.text)
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{path} is not a Hugging Face tokenizer.json: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        decides = {key: content.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
        self.fingerprint = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        candidates = (eod_token,) if eod_token else (_configured_eod(path), *_EOD_NAMES)
        self.eod_token = next((name for name in candidates if name and name in vocabulary), "")
        if not self.eod_token:
            wanted = f"no token {eod_token!r}" if eod_token else f"none of the tokens {', '.join(_EOD_NAMES)}"
            raise DataError(f"{path} has {wanted}; name its END_OF_DOCUMENT token with --eod.")
        self.eod_id = vocabulary[self.eod_token]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)


def _configured_eod(path: Path) -> str:
    """`eos_token` of the `tokenizer_config.json` beside the file, if there is one."""
    try:
        found = json.loads((path.parent / "tokenizer_config.json").read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return ""
    return found.get("content", "") if isinstance(found, dict) else str(found or "")
