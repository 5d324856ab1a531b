"""Decontamination against plain sets of word tuples, and on Wikipedia articles that WikiText's test set holds."""

from __future__ import annotations

import json
import random
import re
from codecs import BOM_UTF8
from pathlib import Path

import numpy as np
import pytest

from data_prep.corpora import corpus
from data_prep.corpora.corpus import CorpusReader
from data_prep.corpora.decontaminate import decontaminate
from data_prep.corpora.evaluation_texts import EvaluationIndex
from data_prep.errors import DataError
from data_prep.sources.base import ReadOptions
from tests.data_prep.support import removed_lines, write_jsonl


def make_text(seed: int, length: int = 60) -> str:
    generator = random.Random(seed)
    return " ".join(f"w{generator.randrange(5000)}" for _ in range(length))


def grams(text: str, n: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


@pytest.mark.parametrize("n", [1, 3, 13])
def test_matches_are_those_of_sets_of_words(tmp_path: Path, n: int) -> None:
    items = [make_text(seed, 30) for seed in range(20)]
    items += [items[3] + " " + make_text(50, 5), "far too short", ""]  # one n-gram in two items, items without any
    path = write_jsonl(tmp_path / "eval.jsonl", [{"question": text, "id": 7} for text in items])
    index = EvaluationIndex([path], n)
    expected_sets = [grams(text, n) for text in items]
    assert index.item_sizes.tolist() == [len(found) for found in expected_sets]
    assert index.hashes.size == len(set.union(*expected_sets))
    for seed in range(30):
        words = items[seed % 21].split()
        text = " ".join([make_text(seed + 100, 40), *words[seed % 7 : seed % 7 + seed], make_text(seed + 200, 40)])
        shared = {item: len(grams(text, n) & found) / len(found) for item, found in enumerate(expected_sets) if found}
        shared = {item: share for item, share in shared.items() if share}
        match = index.match(text)
        if not shared:
            assert match is None
            continue
        assert match is not None
        assert match.ngrams.size == len(grams(text, n) & set.union(*expected_sets))
        assert dict(zip(match.items.tolist(), match.shares.tolist())) == pytest.approx(shared)
        assert tuple(match.example.split()) in set.union(*expected_sets)


@pytest.mark.parametrize("workers", [1, 2])
def test_documents_with_evaluation_text_are_removed_and_named(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "_BATCH", 1000)
    passages = [make_text(seed, 40) for seed in range(5)]  # 28 13-grams each
    write_jsonl(tmp_path / "eval" / "set.jsonl", [{"context": text, "choices": ["a b", "c"]} for text in passages])
    page = "\n = A page = \n\n " + make_text(7, 50).upper().replace(" ", " , ") + "\n"
    (tmp_path / "eval" / "wiki.raw").write_text(page + "\n = Other = \n\n text\n")
    documents = [
        make_text(10, 200),
        "Before. " + passages[1].title().replace(" ", ", ") + ". After.",  # all of an item
        make_text(11, 90) + " " + " ".join(passages[2].split()[:22]),  # 10 of 28: too little
        make_text(12, 90) + " " + " ".join(passages[3].split()[:26]) + "\n",  # 14 of 28: half of an item
        " ".join(" ".join(passage.split()[:16]) for passage in passages),  # 4 of each: 20 in all
        make_text(13) + " " + make_text(7, 50),
        " ".join(passages[2].split()[10:34]),  # 12 of 28, of which some are new
    ]
    path = write_jsonl(tmp_path / "docs.jsonl", [{"text": text} for text in documents])
    report = decontaminate([str(path)], [tmp_path / "eval"], tmp_path / "out", ReadOptions(), workers=workers)
    assert (report.documents, report.documents_with_matches, report.removed, report.kept) == (7, 6, 4, 3)
    kept = [entry.text for entry in CorpusReader([str(tmp_path / "out" / "docs-00000.jsonl.zst")], ReadOptions())]
    assert kept == [documents[0], documents[2], documents[6]]
    lines = removed_lines(tmp_path / "out")
    assert [(line["document"], line["ngrams"], line["item"]) for line in lines] == [
        (f"{path}:2", 28, "line 2"),
        (f"{path}:4", 14, "line 4"),
        (f"{path}:5", 20, "line 1"),
        (f"{path}:6", 38, "A page"),
    ]
    assert lines[0]["item_share"] == 1.0 and str(lines[0]["example"]).split() == passages[1].split()[:13]

    questions, wiki = report.evaluation
    assert (questions.items, questions.too_short, questions.ngrams, wiki.items, wiki.too_short) == (5, 0, 140, 2, 1)
    # Item 3 is found by 10, 12 and 4 n-grams, of which the first and the last share 4, and the first two none.
    assert {item.label: item.share for item in questions.worst} == pytest.approx(
        {
            "line 2": 1.0,
            "line 3": round(22 / 28, 4),
            "line 4": 0.5,
            "line 1": round(4 / 28, 4),
            "line 5": round(4 / 28, 4),
        }
    )
    assert questions.contaminated == 3 and wiki.contaminated == 1
    assert next(item for item in questions.worst if item.label == "line 3").document == f"{path}:7"
    assert json.loads((tmp_path / "out" / "report.json").read_text())["removed"] == 4
    text = (tmp_path / "out" / "report.md").read_text()
    assert "7 documents read, 6 share a 13-gram" in text and "| A page |" in text


def test_parquet_sets_are_read_like_json_lines(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    records = [{"question": make_text(seed, 20), "choices": [make_text(seed + 50, 15), "short"]} for seed in range(4)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "set.parquet")
    write_jsonl(tmp_path / "set.jsonl.gz", list(records))
    first, second = EvaluationIndex([tmp_path / "set.parquet"], 13), EvaluationIndex([tmp_path / "set.jsonl.gz"], 13)
    assert np.array_equal(first.hashes, second.hashes) and first.item_sizes.tolist() == [11] * 4


def test_text_of_evaluation_sets_and_documents_is_no_markup_in_the_report(tmp_path: Path) -> None:
    page = f" = <b>A | page</b> = \n{make_text(1)}\n"
    (tmp_path / "a.raw").write_text(page)
    path = write_jsonl(tmp_path / "docs.jsonl", [{"text": f"[x](y) | {make_text(1)}"}])
    decontaminate([str(path)], [tmp_path / "a.raw"], tmp_path / "out", ReadOptions(), workers=1)
    text = (tmp_path / "out" / "report.md").read_text()
    assert r"| \<b\>A \| page\</b\> |" in text and r"(\[x\](y) \| " in text


def test_folders_of_evaluation_sets_are_read_with_what_links_lead_to(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "elsewhere" / "b.jsonl", [{"q": make_text(1)}])
    (tmp_path / "elsewhere" / "c.jsonl").write_bytes(BOM_UTF8 + json.dumps({"q": make_text(2)}).encode())
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "linked").symlink_to(tmp_path / "elsewhere")
    again = tmp_path / "elsewhere" / "b.jsonl"
    index = EvaluationIndex([tmp_path / "sets", again], 13)
    assert [Path(found.name).name for found in index.sets] == ["b.jsonl", "c.jsonl"] and len(index.labels) == 2


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    docs = str(write_jsonl(tmp_path / "docs.jsonl", [{"text": "x"}]))
    good = write_jsonl(tmp_path / "good.jsonl", [{"q": make_text(1)}])
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"q": "a"}\n{"q": \n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "empty").mkdir()
    short = write_jsonl(tmp_path / "short.jsonl", [{"q": "too short"}])
    for against, sentence in (
        (tmp_path / "none", "there is no evaluation set"),
        (tmp_path / "empty", "holds no file"),
        (broken, r"broken\.jsonl:2: the evaluation set is not JSON lines"),
        (tmp_path / "broken.parquet", r"evaluation set .*broken\.parquet cannot be read after row 0"),
        (short, "hold no text of 13 words or more"),
    ):
        with pytest.raises(DataError, match=sentence):
            decontaminate([docs], [against], tmp_path / "out", ReadOptions())
    with pytest.raises(DataError, match="n=0, matches=20"):
        decontaminate([docs], [good], tmp_path / "out", ReadOptions(), n=0)
    assert not (tmp_path / "out").exists()


def test_articles_of_the_wikitext_test_set_are_found_in_wikipedia(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "contaminated" / "wikipedia_sample.jsonl.zst"
    evaluation = shared_data / "eval" / "wikitext" / "wiki.test.raw"
    report = decontaminate([str(source)], [evaluation], tmp_path / "out", ReadOptions(), workers=2)
    (wikitext,) = report.evaluation
    assert (report.documents, wikitext.items, wikitext.contaminated) == (346, 62, 2)
    found = {item.label: item for item in wikitext.worst}
    assert set(found) == {"Nero", "American Beauty ( 1999 film )"}
    assert found["Nero"].share == pytest.approx(0.87, abs=0.01)
    assert found["American Beauty ( 1999 film )"].share == pytest.approx(0.89, abs=0.01)
    begins = [str(line["begins"]) for line in removed_lines(tmp_path / "out")]
    assert len(begins) == 2 and begins[0].startswith("Nero") and begins[1].startswith("American Beauty (1999 film)")
