"""tiktoken encodings by name, where tiktoken is installed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from data_prep.errors import DataError
from data_prep.tokenizers.base import Tokenizer, library_errors


class TiktokenTokenizer(Tokenizer):
    """A tiktoken encoding such as `tiktoken:gpt2`; END_OF_DOCUMENT is `<|endoftext|>` unless another is named.

    Raises:
        DataError: tiktoken is not installed, the encoding is unknown or its files cannot be loaded.
    """

    kind = "tiktoken"
    unk_id = None

    def __init__(self, name: str, eod_token: str = "") -> None:
        try:
            import tiktoken
        except ImportError:
            raise DataError(f"tiktoken:{name} needs tiktoken; install it with `pip install tiktoken`.") from None
        try:
            self._encoding = tiktoken.get_encoding(name)
        except Exception as error:  # unknown names and every network error
            raise DataError(
                f"tiktoken encoding {name!r} cannot be loaded: {error}. tiktoken downloads an encoding when it is "
                "first used; without a network, let TIKTOKEN_CACHE_DIR name a folder that holds it."
            ) from None
        self.path = Path(f"tiktoken:{name}")
        digest = hashlib.sha256(self._encoding._pat_str.encode())
        for token, rank in sorted(self._encoding._mergeable_ranks.items(), key=lambda item: item[1]):
            digest.update(len(token).to_bytes(4, "little") + token + rank.to_bytes(4, "little"))
        for name_of_token, rank in sorted(self._encoding._special_tokens.items()):
            digest.update(name_of_token.encode() + rank.to_bytes(4, "little"))
        self.fingerprint = digest.hexdigest()
        self.vocab_size = self._encoding.n_vocab
        self.eod_token = eod_token or "<|endoftext|>"
        if self.eod_token not in self._encoding._special_tokens:
            raise DataError(f"tiktoken encoding {name!r} has no special token {self.eod_token!r}.")
        self.eod_id = self._encoding._special_tokens[self.eod_token]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        with library_errors(f"{self.path}: cannot encode a text"):
            return self._encoding.encode_ordinary_batch(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        with library_errors(f"{self.path}: cannot decode ids"):
            return self._encoding.decode([int(token) for token in ids])
