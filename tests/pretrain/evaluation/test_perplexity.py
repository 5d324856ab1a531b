"""Perplexities against the definitions, written out, and the harness's own page rules."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from pretrain.evaluation.evaluate import evaluate_model
from pretrain.evaluation.held_out import Document
from pretrain.evaluation.likelihood import Scorer
from pretrain.evaluation.local_data import wikitext_pages
from pretrain.evaluation.perplexity import DocumentScore, evaluate_perplexity, jackknife, perplexities
from pretrain.evaluation.summary import markdown_summary, warning_lines
from tests.pretrain.evaluation.stubs import EOD, BigramModel, ByteTokenizer, Lossy, by_hand

TEXTS = [
    "A short text.",
    "Ein längerer Text mit Umlauten, über mehrere Fenster.\n\nUnd Absätzen.",
    "  three words here ",
]


def documents(*texts: str) -> list[Document]:
    return [Document(text, "") for text in texts]


def test_the_four_figures_are_their_definitions():
    model = BigramModel(context_length=16)
    result = evaluate_perplexity(Scorer(model, EOD), ByteTokenizer(), documents(*TEXTS))
    nats = -sum(by_hand(model, [EOD, *text.encode()]) for text in TEXTS)
    size = sum(len(text.encode()) for text in TEXTS)
    words = 3 + 10 + 3
    assert result["metrics"] == pytest.approx(
        {
            "token_perplexity": math.exp(nats / size),
            "word_perplexity": math.exp(nats / words),
            "byte_perplexity": math.exp(nats / size),
            "bits_per_byte": nats / size / math.log(2),
        },
        rel=1e-6,
    )
    assert (result["n"], result["tokens"], result["bytes"], result["words"]) == (3, size, size, words)
    assert result["text_bytes"] == size
    assert all(value > 0 for value in result["stderr"].values())


def test_texts_without_words_are_left_out_and_nothing_at_all_is_refused():
    scorer = Scorer(BigramModel(), EOD)
    result, same, other = (
        evaluate_perplexity(scorer, ByteTokenizer(), documents(*texts))
        for texts in ([*TEXTS, "", " \n"], TEXTS, TEXTS[:2])
    )
    assert result == same and result["text_sha256"] != other["text_sha256"]
    with pytest.raises(ValueError, match="at least one document"):
        perplexities([])


def test_documents_and_sources_add_up_to_the_whole():
    mixed = [Document(text, source) for text, source in zip(TEXTS, "aba")]
    result = evaluate_perplexity(Scorer(BigramModel(), EOD), ByteTokenizer(), mixed)
    parts = result["documents"]
    bits = sum(parts["nats"]) / sum(parts["bytes"]) / math.log(2)
    assert bits == pytest.approx(result["metrics"]["bits_per_byte"], rel=1e-12)
    assert {source: part["n"] for source, part in result["sources"].items()} == {"a": 2, "b": 1}
    weighted = sum(part["metrics"]["bits_per_byte"] * part["bytes"] for part in result["sources"].values())
    assert weighted / result["bytes"] == pytest.approx(bits, rel=1e-12)
    assert evaluate_perplexity(Scorer(BigramModel(), EOD), ByteTokenizer(), documents(*TEXTS))["sources"] == {}


def test_a_hopeless_model_has_infinite_word_perplexity_rather_than_an_error():
    assert perplexities([DocumentScore(-5000.0, 100, 2, 400)])["word_perplexity"] == math.inf


def test_the_jackknife_of_a_mean_is_the_textbook_standard_error():
    values = np.random.default_rng(0).normal(size=40).tolist()
    assert jackknife(np.mean, values) == pytest.approx(np.std(values, ddof=1) / math.sqrt(40), rel=1e-12)
    assert jackknife(np.mean, values[:1]) is None


def test_the_jackknife_of_a_ratio_agrees_with_repeated_sampling():
    generator = np.random.default_rng(1)

    def draw():
        sizes = generator.integers(50, 500, 400)
        return [(float(size * generator.normal(1.0, 0.2)), int(size)) for size in sizes]

    def ratio(items):
        return sum(a for a, _ in items) / sum(b for _, b in items)

    spread = np.std([ratio(draw()) for _ in range(400)])
    assert jackknife(ratio, draw()) == pytest.approx(spread, rel=0.35)


def test_a_page_begins_at_its_title_and_nothing_but_line_ends_between_pages_is_lost():
    text = " \n = One = \n \n = = Part = = \n text = a = b\n = Two = \n more \n"
    pages = [record["page"] for record in wikitext_pages(text)]
    assert pages == [" = One = \n \n = = Part = = \n text = a = b", " = Two = \n more \n"]
    assert "\n".join([" ", *pages]) == text


def test_wikitext_has_the_pages_words_and_bytes_it_is_known_to_have(shared_data: Path):
    text = (shared_data / "eval/wikitext/wiki.test.raw").read_text(encoding="utf-8")
    pages = [record["page"] for record in wikitext_pages(text)]
    assert len(pages) == 62
    assert len(text.encode()) == 1_290_590
    assert len(text.split()) == sum(len(page.split()) for page in pages) == 241_211
    # A border between two pages is one line end, and the blank line " \n" before the first title is no page.
    assert sum(len(page.encode()) for page in pages) == 1_290_590 - 61 - 2
    # The harness counts words by splitting at white space, which also counts what is empty at a page's ends.
    assert sum(len(re.split(r"\s+", page)) for page in pages) == 241_335


def test_what_the_tokenizer_loses_is_counted_and_its_figures_are_refused():
    """Only the text without a loss has bits per byte, also among several sources."""
    mixed = [Document("plain text", "ascii"), Document("süß", "german")]
    result = evaluate_perplexity(Scorer(BigramModel(), EOD), Lossy(), mixed)
    assert (result["lost_bytes"], result["scored_bytes"]) == (4, 15)
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert math.isnan(result["metrics"][name]) and result["stderr"][name] is None
    assert math.isfinite(result["metrics"]["token_perplexity"])
    ascii_part, german = result["sources"]["ascii"], result["sources"]["german"]
    assert math.isfinite(ascii_part["metrics"]["bits_per_byte"]) and math.isnan(german["metrics"]["bits_per_byte"])
    found = evaluate_model(BigramModel(), Lossy(), ["perplexity", "routing"], documents=mixed)
    assert {suite: found[suite]["tasks"][suite]["metrics"]["bits_per_byte"] for suite in found} == {
        "perplexity": None,
        "routing": None,
    }
    assert "refused (27 % of the text lost)" in markdown_summary({"run": found})
    [warning, _] = warning_lines({"run": found})
    assert "the tokenizer loses 27 %" in warning
