"""sentencepiece `.model` files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from data_prep.errors import DataError
from data_prep.tokenizers.base import Tokenizer


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model; END_OF_DOCUMENT is its end-of-sentence piece, or the piece that is named.

    Raises:
        DataError: not a model, no end-of-sentence piece, or no piece of that name.
    """

    kind = "sentencepiece"

    def __init__(self, path: Path, eod_token: str = "") -> None:
        self.path = path
        self.proto = data = path.read_bytes()
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(data)
            self.vocab_size = self._model.GetPieceSize()
        except RuntimeError as error:
            raise DataError(f"{path} is not a sentencepiece model: {error}") from None
        self.fingerprint = hashlib.sha256(data).hexdigest()
        self.eod_id = self._model.PieceToId(eod_token) if eod_token else self._model.eos_id()
        if self.eod_id < 0 or (eod_token and self._model.IdToPiece(self.eod_id) != eod_token):
            wanted = f"piece {eod_token!r}" if eod_token else "end-of-sentence piece"
            raise DataError(f"{path} has no {wanted}; name the END_OF_DOCUMENT piece with --eod.")
        self.eod_token = self._model.IdToPiece(self.eod_id)
        self.unk_id = self._model.unk_id()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.EncodeAsIds(list(texts))

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.DecodeIds([int(token) for token in ids])
