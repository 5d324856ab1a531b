"""Cutting enormous texts: nothing is lost, and the ids are those of the whole."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.tokenizers.loading import load_tokenizer
from data_prep.tokenizing import cutting
from data_prep.tokenizing.cutting import cut
from data_prep.tokenizing.encoder import Engine, choose_engine
from tests.data_prep.writing import sentences

TEXT = st.text(alphabet=st.sampled_from("ab1 \n\t.é漢"), max_size=400)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(cutting, "PART", 20)
    monkeypatch.setattr(cutting, "_FARTHEST", 80)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT)
def test_parts_are_the_text(small_parts, text):
    parts, _ = cut(text)
    assert "".join(parts) == text
    assert all(parts) or text == ""
    assert all(len(part) <= 80 for part in parts)


def test_cuts_are_at_edges_where_there_are_any(small_parts):
    text = sentences(200, 5)
    parts, forced = cut(text)
    assert forced == 0 and len(parts) > 50
    for left, right in pairwise(parts):
        newline = left.endswith("\n") and not left[-2].isspace() and not right[0].isspace()
        space = right[0] == " " and right[1].isalpha() and not left[-1].isspace()
        assert newline or space


def test_a_text_without_edges_is_cut_by_force_and_says_so(small_parts):
    parts, forced = cut("x" * 1000)
    assert "".join(parts) == "x" * 1000
    assert forced == len(parts) - 1 > 0


def whole_and_parts(path, text):
    tokenizer = load_tokenizer(path)
    parts, forced = cut(text)
    assert forced == 0 and len(parts) > 3
    ids, _ = Engine(tokenizer).encode(parts, range(1, len(parts)))
    accelerated, _ = choose_engine(tokenizer, [])[0].encode(parts, range(1, len(parts)))
    assert accelerated.tolist() == ids.tolist()
    return tokenizer.encode(text), ids.tolist()


@pytest.mark.parametrize(
    "name", ["smollm/tokenizer.json", "gpt2/tokenizer.json", "neox/tokenizer.json", "llama2/tokenizer.model"]
)
def test_real_tokenizers_on_real_and_made_text(shared_data, name, monkeypatch):
    monkeypatch.setattr(cutting, "PART", 500)
    monkeypatch.setattr(cutting, "_FARTHEST", 2000)
    wiki = (shared_data / "eval" / "wikitext" / "wiki.test.raw").read_text(encoding="utf-8")[:150_000]
    expected, found = whole_and_parts(shared_data / "tokenizers" / name, wiki)
    assert found == expected
    source = random.Random(4)
    made = "".join(
        source.choice(["word", " ", " ", "\n", "\n\n", "  ", "12", "don't", ".", "é", "x y\nz"]) for _ in range(30_000)
    )
    expected, found = whole_and_parts(shared_data / "tokenizers" / name, made)
    assert found == expected
