"""Hugging Face `tokenizer.json` files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson
import tokenizers

from data_prep.errors import DataError
from data_prep.json_input import parse_json
from data_prep.tokenizers.base import MOST_IDS, Tokenizer, configured_eod, library_errors

# Looked for in this order when nothing names the token.
_EOD_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[SEP]")
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`. END_OF_DOCUMENT is the token named, the `eos_token` of the `tokenizer_config.json` beside it,
    or the first of the usual names that exists.

    content: the parsed file. The library's own tokenizer is built when it is first needed: behind an accelerator that
    may be never.

    Names of control tokens in a text are text: the library is told so for the tokens it adds, and where the model
    itself makes a control token of its name (a Unigram vocabulary that holds `</s>`, say), the ids of the name's parts
    stand in its place.

    Raises:
        DataError: not such a file, no END_OF_DOCUMENT in it, or one that other text becomes.
    """

    kind = "huggingface"

    def __init__(self, path: Path, eod_token: str = "") -> None:
        self.path = path
        try:
            self.text = path.read_bytes().decode("utf-8")
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: is not UTF-8 text (byte {error.start}).") from None
        self.content: dict[str, Any] = parse_json(self.text, path)
        ids = _ids_by_name(self.content, path)
        model = self.content["model"]
        self.vocab_size = max(ids.values()) + 1
        self.unk_id = model.get("unk_id") if isinstance(model["vocab"], list) else ids.get(model.get("unk_token") or "")
        try:
            decides = {key: self.content.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
            self.fingerprint = hashlib.sha256(orjson.dumps(decides, option=orjson.OPT_SORT_KEYS)).hexdigest()
        except TypeError as error:  # half a surrogate pair, or a number beyond 64 bits
            raise DataError(f"{path}: {error}; it is not a Hugging Face tokenizer.json.") from None
        self.eod_token = _end_of_document(path, ids, eod_token)
        self.eod_id = ids[self.eod_token]
        if self.eod_id == self.unk_id or (model.get("byte_fallback") and _BYTE.fullmatch(self.eod_token)):
            raise DataError(
                f"{path}: other text becomes {self.eod_token!r} too, so it cannot be END_OF_DOCUMENT; name another "
                "token with --eod."
            )
        self._control = {token["id"] for token in self.content["added_tokens"] if token.get("special")}
        self._control = (self._control | {self.eod_id}) - {self.unk_id}
        if model.get("byte_fallback"):
            self._control -= {number for name, number in ids.items() if _BYTE.fullmatch(name)}
        self._as_text: dict[int, list[int]] = {}
        for token in self.content["added_tokens"]:
            if token["id"] == self.eod_id and not token.get("special"):
                token["special"] = True
                self.text = json.dumps(self.content)

    @cached_property
    def _tokenizer(self) -> tokenizers.Tokenizer:
        with library_errors(f"{self.path}: is not a Hugging Face tokenizer.json"):
            loaded = tokenizers.Tokenizer.from_str(self.text)
            for token in self.content["added_tokens"]:
                if (found := loaded.token_to_id(token["content"])) != token["id"]:
                    raise DataError(
                        f"{self.path}: the added token {token['content']!r} has the id {token['id']}, but the "
                        f"tokenizers library gives it {found}; the file is damaged."
                    )
            loaded.no_truncation()
            loaded.no_padding()
            loaded.encode_special_tokens = True
        return loaded

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        with library_errors(f"{self.path}: cannot encode a text"):
            encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            return [self._without_control(found.ids) for found in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        with library_errors(f"{self.path}: cannot decode ids"):
            return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)

    def _without_control(self, ids: list[int]) -> list[int]:
        """`ids` of a text, in which no control token can have been meant."""
        met = self._control.intersection(ids)
        if not met:
            return ids
        for token in met - self._as_text.keys():
            self._as_text[token] = self._spell(token)
        return [part for token in ids for part in self._as_text.get(token, (token,))]

    def _spell(self, token: int) -> list[int]:
        """Ids of the name of a control token as text: of two parts of it that the model makes no control token of."""
        model = self._tokenizer.model
        name = model.id_to_token(token) or ""
        for middle in range(1, len(name)):
            try:
                parts = [*model.tokenize(name[:middle]), *model.tokenize(name[middle:])]
            except Exception:  # the model has no unknown token
                continue
            if self._control.isdisjoint(part.id for part in parts):
                return [part.id for part in parts]
        if token == self.eod_id:
            raise DataError(
                f"{self.path}: text becomes END_OF_DOCUMENT, {self.eod_token!r}; name another token with --eod, or use "
                "another tokenizer."
            )
        return [token]  # a line break that is called a control token, say: it stands for nothing but itself


def _ids_by_name(content: Any, path: Path) -> dict[str, int]:
    """Ids of the model's tokens and of those added to it; `added_tokens` is a list afterwards."""
    model: Any = content.get("model") if isinstance(content, dict) else None
    vocabulary: Any = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list) and all(isinstance(e, list) and e and isinstance(e[0], str) for e in vocabulary):
        ids = {entry[0]: number for number, entry in enumerate(vocabulary)}  # Unigram: names and scores
    elif isinstance(vocabulary, dict):
        ids = dict(vocabulary)
    else:
        raise DataError(f"{path}: is not a Hugging Face tokenizer.json: it has no vocabulary at model.vocab.")
    added = content["added_tokens"] = content.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(t, dict) and isinstance(t.get("content"), str) for t in added):
        raise DataError(f"{path}: added_tokens must be a list of objects with content and id.")
    ids |= {token["content"]: token.get("id") for token in added}
    for name, number in ids.items():
        if type(number) is not int or not 0 <= number < MOST_IDS:
            raise DataError(f"{path}: the id of token {name!r:.100} must be a number from 0, found {number!r:.100}.")
    if not ids:
        raise DataError(f"{path}: its vocabulary is empty.")
    for key, kinds in (("unk_id", int), ("unk_token", str)):
        if not isinstance(model.get(key), (kinds, type(None))):
            raise DataError(f"{path}: model.{key} is {model[key]!r:.100}, which is no token.")
    return ids


def _end_of_document(path: Path, ids: dict[str, int], wanted: str) -> str:
    if wanted:
        lacks = f"no token {wanted!r}"
    elif wanted := configured_eod(path.parent):
        lacks = f"no token {wanted!r}, the eos_token of the tokenizer_config.json beside it"
    else:
        wanted = next((name for name in _EOD_NAMES if name in ids), "")
        lacks = f"none of the tokens {', '.join(_EOD_NAMES)}"
    if not wanted or wanted not in ids:
        raise DataError(f"{path} has {lacks}; name its END_OF_DOCUMENT token with --eod.")
    return wanted
