"""N-gram hashes against sets of tuples of words, which know nothing of hashing."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.corpora import ngrams as module
from data_prep.corpora.ngrams import ngram_hashes, normalized, word_hashes, words_of
from tests.fuzz.support import processor_time

TEXT = st.text(st.sampled_from("abcAB 01_-.,'\n\téa\u0301\u2019\u2013ßЖЖ漢字😀\u00a0บ้กุカ\u3099្ក한မြ"), max_size=80)


# Letters and marks by the names that the Unicode database gives them.
UNSPACED = ("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO")
UNSPACED += ("THAI", "LAO", "KHMER", "MYANMAR", "IDEOGRAPHIC ITERATION MARK", "COMBINING KATAKANA", "HANGZHOU NUMERAL")
UNSPACED += ("HENTAIGANA", "VERTICAL KANA", "VERTICAL IDEOGRAPHIC", "IDEOGRAPHIC CLOSING", "IDEOGRAPHIC NUMBER", "MASU")


def words(text: str) -> list[str]:
    """Runs of \\w; but of scripts without spaces each letter with its marks."""
    found: list[str] = []
    open_word = ""  # the kind of the word under way
    for character in unicodedata.normalize("NFC", text).lower():
        if unicodedata.name(character, "").startswith(UNSPACED):
            if character.isalnum():
                found.append(character)
                open_word = "letter"
                continue
            if unicodedata.category(character) in ("Mn", "Mc"):
                found[-1:] = [found[-1] + character] if open_word == "letter" else [*found[-1:], character]
                open_word = "letter"
                continue
        if re.match(r"\w", character):
            found[-1:] = [found[-1] + character] if open_word == "word" else [*found[-1:], character]
            open_word = "word"
        else:
            open_word = ""
    return found


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


def test_no_two_of_a_million_words_share_a_hash() -> None:
    text = " ".join(f"{number:x}" for number in range(1_000_000))
    assert np.unique(word_hashes(text)).size == 1_000_000


def test_long_texts_are_hashed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "the quick brown fox " * 50 + "x" * 200 + " end"
    whole = word_hashes(text)
    monkeypatch.setattr(module, "_PART", 64)
    parts = word_hashes(text)
    assert parts[:200].tolist() == whole[:200].tolist() and parts[-1] == whole[-1]


def test_hashes_stay_what_they_are() -> None:
    """Signatures and reports of different machines and releases are compared with one another."""
    found = ngram_hashes(word_hashes("The quick-brown Fox"), 2).tolist()
    assert found == [8299794868474364208, 5391054183650655607, 9969114287553916399]


def test_scripts_without_spaces_have_a_word_a_letter() -> None:
    assert words_of("我们在2024年。Hello世界") == ["我", "们", "在", "2024", "年", "hello", "世", "界"]
    assert words_of("ข้อมูลภาษา") == ["ข้", "อ", "มู", "ล", "ภ", "า", "ษ", "า"]
    assert words_of("データの、カ\u3099") == ["デ", "ー", "タ", "の", "ガ"]
    assert words_of("မြန်မာ ខ្មែរ ລາວ")[:2] == ["မြ", "န်"]
    assert words_of("한국어 텍스트 हिन्दी") == ["한국어", "텍스트", "ह", "न", "द"]  # as ever


def test_a_run_of_marks_takes_no_square_of_its_length_in_time() -> None:
    """Putting 200,000 marks in order would take minutes, as would a search for each of 60,000 kinds of symbols."""
    with processor_time(5.0):
        assert words_of("a" + "\u0301\u0327" * 100_000 + " end")[-1] == "end"
        symbols = "".join(chr(code) for code in range(0xE0000, 0x110000) if not chr(code).isalnum())
        assert words_of(symbols * 5) == []
