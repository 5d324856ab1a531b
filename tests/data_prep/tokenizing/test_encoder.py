"""The accelerator gives the reference's ids, or is not used."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.tokenizers.loading import load_tokenizer
from data_prep.tokenizing import encoder as engine_module
from data_prep.tokenizing.encoder import (
    FASTOKENS,
    FASTOKENS_DIGITS,
    REFERENCE,
    Engine,
    choose_engine,
    count_differences,
)
from data_prep.tokenizing.nasty import nasty_texts
from data_prep.tokenizing.train_tokenizer import _train_sentencepiece
from tests.data_prep.small_tokenizers import trained_sentencepiece
from tests.data_prep.tokenizing.test_tokenize import encoder
from tests.data_prep.writing import sentences

fastokens = pytest.importorskip("fastokens")


def expected_ids(path, texts):
    """Ids by the tokenizer's own library alone, text after text; control tokens in a text stay text."""
    encode = encoder(path)
    return [encode(text)[:-1] for text in texts]


def lists(flat):
    ids, starts = flat
    return [ids[a:b].tolist() for a, b in pairwise(starts)]


@pytest.fixture(scope="module")
def digits_bpe(byte_bpe, tmp_path_factory):
    """The small tokenizer with SmolLM's pre-tokenizer in front."""
    content = json.loads(byte_bpe.read_text())
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {**content["pre_tokenizer"], "use_regex": True},
        ],
    }
    path = tmp_path_factory.mktemp("digits") / "tokenizer.json"
    path.write_text(json.dumps(content))
    return path


def test_the_fastest_exact_engine_is_chosen(byte_bpe, digits_bpe, sentencepiece_model):
    sample = [sentences(30, 4)]
    assert choose_engine(load_tokenizer(byte_bpe), sample)[1]["name"] == FASTOKENS
    chosen, report = choose_engine(load_tokenizer(digits_bpe), sample)
    assert (chosen.name, report["name"], report["refused"]) == (FASTOKENS_DIGITS, FASTOKENS_DIGITS, {})
    assert report["versions"]["fastokens"]
    assert choose_engine(load_tokenizer(sentencepiece_model), sample)[1]["name"] == FASTOKENS


@pytest.mark.parametrize("kind", ["byte_bpe", "digits_bpe"])
def test_every_engine_gives_the_librarys_ids_on_nasty_texts(kind, request):
    path = request.getfixturevalue(kind)
    texts = list(nasty_texts())
    wanted = expected_ids(path, texts)
    for name in (REFERENCE, FASTOKENS) + ((FASTOKENS_DIGITS,) if kind == "digits_bpe" else ()):
        found = lists(Engine(load_tokenizer(path), name).encode(texts))
        assert [n for n, (a, b) in enumerate(zip(found, wanted)) if a != b] == [], name


@pytest.fixture(scope="module", params=["digits", "dummy prefix", "no dummy prefix"])
def engine(request, digits_bpe, sentencepiece_model, tmp_path_factory):
    if request.param == "digits":
        return Engine(load_tokenizer(digits_bpe), FASTOKENS_DIGITS)
    path = sentencepiece_model
    if request.param == "no dummy prefix":  # as `tokenizer train` makes models
        path = tmp_path_factory.mktemp("plain") / "tokenizer.model"
        path.write_bytes(_train_sentencepiece(iter([sentences(300, 6)]), "bpe", 380, {"bytes": 0}))
    return Engine(load_tokenizer(path), FASTOKENS)


@settings(max_examples=80, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=80), min_size=1, max_size=6))
def test_any_text_gets_the_librarys_ids(engine, texts):
    assert lists(engine.encode(texts)) == expected_ids(engine.tokenizer.path, texts)


def test_sentencepiece_models_with_normalisation_or_unigram_stay_with_the_library(tmp_path):
    for number, more in enumerate(({"model_type": "unigram"}, {"normalization_rule_name": "nmt_nfkc"})):
        options = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 380, "character_coverage": 0.99, **more}
        path = trained_sentencepiece(tmp_path / f"{number}.model", sentences(300, 7), **options)
        _, report = choose_engine(load_tokenizer(path), ["text"])
        assert (report["name"], report["refused"]) == (REFERENCE, {})


class Failing:
    """An accelerator that fails on some texts, as a library does: alone or in a batch."""

    def __init__(self, fast, bad):
        self.fast, self.bad = fast, bad

    def encode_batch_flat(self, texts, **options):
        if any(self.bad in text for text in texts):
            raise ValueError("match limit")
        return self.fast.encode_batch_flat(texts, **options)


def test_a_text_the_accelerator_fails_on_goes_to_the_reference_alone(digits_bpe):
    texts = [sentences(2, n) + ("bad" if n in (3, 17, 18) else "") for n in range(40)]
    engine = Engine(load_tokenizer(digits_bpe), FASTOKENS_DIGITS)
    engine._fast = Failing(engine._fast, "bad")
    assert lists(engine.encode(texts)) == expected_ids(digits_bpe, texts)
    assert engine.fallbacks == 3


def test_disputed_white_space_is_left_to_the_reference(digits_bpe):
    texts = ["a \u180e\u180e1", "x", "\u180e", "1 \u180e 2"]
    engine = Engine(load_tokenizer(digits_bpe), FASTOKENS_DIGITS)
    assert lists(engine.encode(texts)) == expected_ids(digits_bpe, texts)
    assert engine.fallbacks == 3


def test_an_engine_with_one_other_id_is_refused_and_said_so(byte_bpe, monkeypatch):
    class Wrong:
        def __init__(self, fast):
            self.fast = fast

        def encode_batch_flat(self, texts, **options):
            ids, starts = self.fast.encode_batch_flat(texts, **options)
            changed = np.frombuffer(ids, np.uint32).copy()
            changed[-1:] += 1
            return changed.tobytes(), starts

    load = engine_module._load_fastokens
    monkeypatch.setattr(engine_module, "_load_fastokens", lambda *a: Wrong(load(*a)))
    chosen, report = choose_engine(load_tokenizer(byte_bpe), ["some text"])
    assert chosen.name == report["name"] == REFERENCE
    assert "1 of" in report["refused"][FASTOKENS]


def test_long_white_space_that_the_accelerator_refuses_still_gets_ids(byte_bpe):
    text = "a" + " " * 1_000_000 + "b"
    engine = Engine(load_tokenizer(byte_bpe), FASTOKENS)
    assert lists(engine.encode([text])) == expected_ids(byte_bpe, [text])


@pytest.mark.parametrize(
    ("name", "best"),
    [
        ("smollm/tokenizer.json", FASTOKENS_DIGITS),
        ("gpt2/tokenizer.json", FASTOKENS),
        ("neox/tokenizer.json", FASTOKENS),
        ("llama2/tokenizer.model", FASTOKENS),
    ],
)
def test_real_tokenizers_agree_on_nasty_and_real_text(shared_data, name, best):
    path = shared_data / "tokenizers" / name
    wiki = (shared_data / "eval" / "wikitext" / "wiki.test.raw").read_text(encoding="utf-8")[:300_000]
    chosen, report = choose_engine(load_tokenizer(path), wiki.split("\n \n"))
    assert (chosen.name, report["refused"]) == (best, {})
    texts = [wiki[at : at + 3000] for at in range(0, 60_000, 3000)]
    assert lists(chosen.encode(texts)) == expected_ids(path, texts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm", "gpt2"])
def test_every_character_of_unicode_in_many_neighbourhoods(shared_data, name):
    path = shared_data / "tokenizers" / name / "tokenizer.json"
    engine = Engine(load_tokenizer(path), FASTOKENS_DIGITS if name == "smollm" else FASTOKENS)
    reference = Engine(load_tokenizer(path))
    for start in range(0, 0x110000, 4096):
        texts = [
            f"{c}a {c} b{c}1 {c}{c} 1{c}2  {c}\n{c}'s {c}  7 {c}"
            for c in map(chr, range(start, start + 4096))
            if not 0xD800 <= ord(c) <= 0xDFFF
        ]
        if texts:
            assert count_differences(engine.encode(texts), reference.encode(texts)) == 0, hex(start)
