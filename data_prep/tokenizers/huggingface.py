"""Hugging Face `tokenizer.json` files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson
import tokenizers

from data_prep.errors import DataError
from data_prep.tokenizers.base import Tokenizer

# Looked for in this order when nothing names the token.
_EOD_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[SEP]")


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`. END_OF_DOCUMENT is the token named, the `eos_token` of the `tokenizer_config.json` beside it,
    or the first of the usual names that exists.

    content: the parsed file. The library's own tokenizer is built when it is first needed: behind an accelerator that
    may be never.

    Raises:
        DataError: not such a file, or no END_OF_DOCUMENT in it.
    """

    kind = "huggingface"

    def __init__(self, path: Path, eod_token: str = "") -> None:
        self.path = path
        try:
            self.text = path.read_bytes()
            self.content: dict[str, Any] = orjson.loads(self.text)
            vocabulary = self.content["model"]["vocab"]
            pairs = (
                vocabulary.items() if isinstance(vocabulary, dict) else ((v[0], n) for n, v in enumerate(vocabulary))
            )
            ids: dict[str, int] = {**dict(pairs), **{a["content"]: a["id"] for a in self.content["added_tokens"]}}
            self.vocab_size = max(ids.values()) + 1
            model = self.content["model"]
            self.unk_id = model["unk_id"] if model.get("type") == "Unigram" else ids.get(model.get("unk_token"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise DataError(f"{path} is not a Hugging Face tokenizer.json: {error!r}") from None
        decides = {key: self.content.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
        self.fingerprint = hashlib.sha256(orjson.dumps(decides, option=orjson.OPT_SORT_KEYS)).hexdigest()
        candidates = (eod_token,) if eod_token else (_configured_eod(path), *_EOD_NAMES)
        self.eod_token = next((name for name in candidates if name and name in ids), "")
        if not self.eod_token:
            wanted = f"no token {eod_token!r}" if eod_token else f"none of the tokens {', '.join(_EOD_NAMES)}"
            raise DataError(f"{path} has {wanted}; name its END_OF_DOCUMENT token with --eod.")
        self.eod_id = ids[self.eod_token]

    @cached_property
    def _tokenizer(self) -> tokenizers.Tokenizer:
        try:
            loaded = tokenizers.Tokenizer.from_str(self.text.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{self.path} is not a Hugging Face tokenizer.json: {error}") from None
        loaded.no_truncation()
        loaded.no_padding()
        loaded.encode_special_tokens = True
        return loaded

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)


def _configured_eod(path: Path) -> str:
    """`eos_token` of the `tokenizer_config.json` beside the file, if there is one."""
    try:
        found = orjson.loads((path.parent / "tokenizer_config.json").read_bytes()).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return ""
    return found.get("content", "") if isinstance(found, dict) else str(found or "")
