"""The sample of the user's documents that the encoder is checked with before the work begins."""

from __future__ import annotations

from data_prep.sources.base import ReadOptions
from data_prep.sources.find import find_sources
from data_prep.sources.groups import plan_groups
from data_prep.tokenizing import tokenizer_check as check
from data_prep.tokenizing.tokenizer_check import sample_documents
from tests.data_prep.writing import documents, jsonl, write_jsonl


def test_whole_documents_from_all_over_the_corpus(tmp_path):
    """Twelve files that are groups of their own, with damage in one of them."""
    for number in range(12):
        write_jsonl(tmp_path / f"{number:02d}.jsonl", documents(300, number))
    (tmp_path / "02.jsonl").write_bytes(b"broken\n" + jsonl(documents(300, 2)))
    found, _ = find_sources([str(tmp_path)], ReadOptions())
    groups = plan_groups(found, ReadOptions(), 80_000)
    assert len(groups) == 12
    texts = sample_documents(groups, ReadOptions())
    owner = {text: number for number in range(12) for text in documents(300, number)}
    met = {owner[text] for text in texts}  # a text that was cut or changed would be no key
    assert len(met) == 6 and max(met) - min(met) >= 10
    for number in met:
        mine = [text for text in texts if owner[text] == number]
        assert mine == documents(300, number)[: len(mine)]
    assert check._LEAST <= sum(map(len, texts)) <= 1.2 * check._LEAST


def test_a_long_document_gives_its_beginning(tmp_path):
    text = "".join(documents(2000))
    assert len(text) > check._LONGEST
    write_jsonl(tmp_path / "a.jsonl", [text])
    found, _ = find_sources([str(tmp_path)], ReadOptions())
    (sample,) = sample_documents(plan_groups(found, ReadOptions()), ReadOptions())
    assert sample == text[: check._LONGEST]
