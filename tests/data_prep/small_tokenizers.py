"""A tokenizer.json of every kind of model, put together by hand with the `tokenizers` library, and sentencepiece's."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

LETTERS = "abcdefghijklmnopqrstuvwxyz<>/|_[]().,!?'-0123456789"


def unigram(path: Path, *, end: str = "</s>") -> Path:
    """Single characters of ASCII, some words, and `end`; everything else becomes <unk>."""
    pieces = [("<unk>", 0.0), (end, -1.0), ("\u2581", -2.0), ("\u2581the", -3.0), ("ing", -3.0)]
    tokenizer = tokenizers.Tokenizer(models.Unigram([*pieces, *((c, -5.0) for c in LETTERS)], unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return _saved(tokenizer, path, [end])


def word_piece(path: Path, *, end: str = "[SEP]") -> Path:
    """Lower-case words between spaces; what is not in the vocabulary becomes [UNK]."""
    words = ["[UNK]", end, "the", "cat", "##s", "##ing", *LETTERS]
    tokenizer = tokenizers.Tokenizer(models.WordPiece({w: n for n, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Replace("THE", "the")
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(cleanup=False)
    return _saved(tokenizer, path, [end])


def word_level(path: Path, *, end: str = "</s>") -> Path:
    """Whole words between spaces; others become <unk>."""
    words = ["<unk>", end, "the", "cat", "sat"]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _saved(tokenizer, path, [end])


def bpe(path: Path, *, end: str = "</s>", special: bool = True, merged: bool = True, **model: Any) -> Path:
    """Byte-level BPE; `merged`: its merges lead from the letters of `end` to `end`."""
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(end[:n], end[n]) for n in range(1, len(end))] if merged else []
    words += ["".join(pair) for pair in merges] if merged else [end]
    tokenizer = tokenizers.Tokenizer(models.BPE({w: n for n, w in enumerate(words)}, merges, **model))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if special:
        return _saved(tokenizer, path, [end])
    tokenizer.add_tokens([tokenizers.AddedToken(end, special=False)])
    return _saved(tokenizer, path, [])


def sentencepiece_unigram(path: Path, text: str, **more: Any) -> Path:
    """A trained sentencepiece model without byte fallback: what it has not seen becomes its unknown piece."""
    options = {"model_type": "unigram", "character_coverage": 1.0, "hard_vocab_limit": False, "vocab_size": 60}
    return trained_sentencepiece(path, text, **{**options, **more})


def trained_sentencepiece(path: Path, text: str, **options: Any) -> Path:
    """A sentencepiece model, trained with the library itself; it normalises nothing unless told to."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=model,
        minloglevel=2,
        **{"normalization_rule_name": "identity", **options},
    )
    path.write_bytes(model.getvalue())
    return path


def _saved(tokenizer: tokenizers.Tokenizer, path: Path, special: list[str]) -> Path:
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(path))
    return path
