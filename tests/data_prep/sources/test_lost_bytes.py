"""What of a text its ids do not hold, for every kind of tokenizer; expected by counting bytes by hand."""

from __future__ import annotations

import json

import pytest

from data_prep.tokenizers.loading import load_tokenizer
from data_prep.tokenizers.lost_bytes import lost_bytes
from tests.data_prep import small_tokenizers as small
from tests.data_prep.writing import sentences


def lost(path, text):
    tokenizer = load_tokenizer(path)
    return lost_bytes(tokenizer, text, tokenizer.encode(text))


@pytest.mark.parametrize("text", ["", "the cat sat", "naïve 漢字 🙂\n\n  two", "\ttab </s> <unk>", "\x00\x7f"])
def test_tokenizers_with_an_id_for_every_byte_lose_nothing(byte_bpe, sentencepiece_model, text):
    assert lost(byte_bpe, text) == 0
    assert lost(sentencepiece_model, text) == 0


@pytest.mark.parametrize(
    ("make", "text", "expected"),
    [
        (small.unigram, "the cat", 0),
        (small.unigram, "日本 the", 6),  # two characters of three bytes become one <unk>
        (small.unigram, "the UNK", 3),  # the letters of the unknown token's own name do not make up for lost ones
        (small.unigram, "éé", 4),
        (small.unigram, "a\nb\tc", 2),
        (small.unigram, "🙂", 4),
        (small.word_level, "the cat sat", 0),
        (small.word_level, "the dog sat", 3),
        (small.word_piece, "the cats", 0),
        (small.word_piece, "THE cats", 3),  # its normalizer folds this word's case
        (small.word_piece, "the nœud", 5),
    ],
)
def test_what_becomes_the_unknown_token(tmp_path, make, text, expected):
    assert lost(make(tmp_path / "tokenizer.json"), text) == expected


def test_sentencepiece_without_byte_fallback(tmp_path):
    path = small.sentencepiece_unigram(tmp_path / "t.model", "plain words and more of them\n" * 20)
    assert lost(path, "plain words") == 0
    assert lost(path, "plain 漢字 words") == 6


def test_bytes_that_a_byte_level_vocabulary_does_not_have(tmp_path):
    path = small.bpe(tmp_path / "tokenizer.json", merged=False)
    content = json.loads(path.read_text())
    del content["model"]["vocab"]["Ã"]  # the first byte of é
    path.write_text(json.dumps(content))
    assert lost(path, "cafe") == 0
    assert lost(path, "café café") == 4


def test_a_share_of_a_long_text(tmp_path):
    path = small.unigram(tmp_path / "tokenizer.json")
    text = sentences(200, 5).lower()
    known = set(small.LETTERS) | {" "}
    assert lost(path, text) == sum(len(c.encode()) for c in text if c not in known) > 0
