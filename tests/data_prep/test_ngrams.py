"""N-gram hashes against sets of tuples of words, which know nothing of hashing."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import ngrams as module
from data_prep.ngrams import ngram_hashes, ngrams_of_pieces, normalized, word_hashes

KNOWN = [8299794868474364208, 5391054183650655607, 9969114287553916399]
TEXT = st.text(st.sampled_from("abcAB 01_-.,'\n\téa\u0301\u2019\u2013ßЖЖ漢字😀\u00a0"), max_size=80)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", unicodedata.normalize("NFC", text).lower())


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(TEXT, st.text(max_size=60)))
def test_words_are_those_of_a_regular_expression(text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    assert [word for word in normalized(text).decode().split(" ") if word] == words(text)


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(TEXT, max_size=5), n=st.integers(1, 4))
def test_equal_ngrams_and_only_those_have_equal_hashes(texts: list[str], n: int) -> None:
    names: dict[int, tuple[str, ...]] = {}
    hashes: dict[tuple[str, ...], int] = {}
    for text in texts:
        expected = words(text)
        grams = [tuple(expected[i : i + n]) for i in range(len(expected) - n + 1)]
        found = ngram_hashes(word_hashes(text), n).tolist()
        assert len(found) == len(grams)
        for gram, value in zip(grams, found):
            assert names.setdefault(value, gram) == gram
            assert hashes.setdefault(gram, value) == value


def test_accents_as_characters_of_their_own_make_no_difference() -> None:
    text = "Café naïve Åre 한국어 résumé"
    apart = unicodedata.normalize("NFD", text)
    assert apart != text and word_hashes(apart).tolist() == word_hashes(text).tolist()
    assert len(word_hashes(text)) == 5


def test_no_two_of_a_million_words_share_a_hash() -> None:
    text = " ".join(f"{number:x}" for number in range(1_000_000))
    assert np.unique(word_hashes(text)).size == 1_000_000


@settings(max_examples=100, deadline=None)
@given(pieces=st.lists(TEXT.map(lambda text: text + " "), max_size=6), n=st.integers(1, 5))
def test_pieces_have_the_ngrams_of_the_whole(pieces: list[str], n: int) -> None:
    whole = ngram_hashes(word_hashes("".join(pieces)), n)
    assert np.concatenate([*ngrams_of_pieces(pieces, n), np.empty(0, np.uint64)]).tolist() == whole.tolist()


def test_long_texts_are_hashed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "the quick brown fox " * 50 + "x" * 200 + " end"
    whole = word_hashes(text)
    monkeypatch.setattr(module, "_PART", 64)
    parts = word_hashes(text)
    assert parts[:200].tolist() == whole[:200].tolist() and parts[-1] == whole[-1]


def test_hashes_stay_what_they_are() -> None:
    """Signatures and reports of different machines and releases are compared with one another."""
    assert ngram_hashes(word_hashes("The quick-brown Fox"), 2).tolist() == KNOWN
