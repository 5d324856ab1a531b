"""sentencepiece `.model` files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from data_prep.errors import DataError
from data_prep.tokenizers.base import Tokenizer, configured_eod, library_errors


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model. END_OF_DOCUMENT is the piece that is named, the `eos_token` of the `tokenizer_config.json`
    beside it, or its end-of-sentence piece; a control piece, as no text becomes one.

    Raises:
        DataError: not a model, no end-of-sentence piece, no piece of that name, or one that text becomes.
    """

    kind = "sentencepiece"

    def __init__(self, path: Path, eod_token: str = "") -> None:
        self.path = path
        try:
            self.proto = data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from None
        self._model = sentencepiece.SentencePieceProcessor()
        with library_errors(f"{path} is not a sentencepiece model"):
            self._model.LoadFromSerializedProto(data)
            self.vocab_size = self._model.GetPieceSize()
        self.fingerprint = hashlib.sha256(data).hexdigest()
        eod_token = eod_token or configured_eod(path.parent)
        with library_errors(f"{path}: END_OF_DOCUMENT {eod_token!r} cannot be looked up"):
            self.eod_id = self._model.PieceToId(eod_token) if eod_token else self._model.eos_id()
            known = self.eod_id >= 0 and (not eod_token or self._model.IdToPiece(self.eod_id) == eod_token)
            if not known:
                wanted = f"piece {eod_token!r}" if eod_token else "end-of-sentence piece"
                raise DataError(f"{path} has no {wanted}; name the END_OF_DOCUMENT piece with --eod.")
            self.eod_token = self._model.IdToPiece(self.eod_id)
            self.unk_id = self._model.unk_id()
        if not self._model.IsControl(self.eod_id):
            raise DataError(
                f"{path}: {self.eod_token!r} is no control piece, so text can become it; name another "
                "END_OF_DOCUMENT piece with --eod."
            )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        with library_errors(f"{self.path}: cannot encode a text"):
            return self._model.EncodeAsIds(list(texts))

    def decode(self, ids: Sequence[int]) -> str:
        with library_errors(f"{self.path}: cannot decode ids"):
            return self._model.DecodeIds([int(token) for token in ids])
