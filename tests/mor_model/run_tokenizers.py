"""Small tokenizers as a run folder holds them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

END_OF_DOCUMENT = "<|endoftext|>"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def letters_tokenizer(folder: Path) -> Path:
    """A `tokenizer.json` of letters and the space, with END_OF_DOCUMENT as id 0."""
    vocabulary = {END_OF_DOCUMENT: 0, **{letter: 1 + place for place, letter in enumerate(LETTERS + " ")}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens([END_OF_DOCUMENT])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_DOCUMENT}))
    return folder


def trained_sentencepiece(folder: Path, lines: list[str], **options: Any) -> Path:
    """A `tokenizer.model` trained on `lines`, with byte fallback."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=trained,
        byte_fallback=True,
        eos_piece=END_OF_DOCUMENT,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(trained.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_DOCUMENT}))
    return folder
