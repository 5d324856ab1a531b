"""Deduplication against exact Jaccard similarities worked out with Python sets."""

from __future__ import annotations

import json
import random
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.corpora import corpus, dedup
from data_prep.corpora.corpus import CorpusReader
from data_prep.corpora.dedup import deduplicate, exact_originals, near_originals, signatures_of
from data_prep.errors import DataError
from data_prep.sources.base import ReadOptions
from tests.data_prep.support import removed_lines, write_jsonl

WORDS = [f"word{number}" for number in range(400)]


def make_text(seed: int, length: int = 120) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def change(text: str, words: int, seed: int = 0) -> str:
    """`text` with that many of its words replaced."""
    parts = text.split()
    for place in random.Random(seed).sample(range(len(parts)), words):
        parts[place] = f"changed{seed}x{place}"
    return " ".join(parts)


def jaccard(first: str, second: str) -> float:
    """Similarity of the sets of word 5-grams, by its definition."""
    sets = []
    for text in (first, second):
        words = re.findall(r"\w+", text.lower())
        sets.append({tuple(words[i : i + 5]) for i in range(len(words) - 4)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_signatures_estimate_the_jaccard_similarity(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = []
    for seed in range(60):
        first = make_text(seed)
        second = change(first, seed % 12, seed)
        signatures = signatures_of([first, second])
        errors.append(float(np.mean(signatures[0] == signatures[1])) - jaccard(first, second))
    # The standard error of one estimate is at most 0.5 / sqrt(128) = 0.044.
    assert abs(np.mean(errors)) < 0.02 and max(map(abs, errors)) < 0.2
    texts = [make_text(seed, 30 + 50 * seed) for seed in range(6)]
    whole = signatures_of(texts)
    monkeypatch.setattr(dedup, "_GRAMS", 100)  # n-grams held at a time
    assert np.array_equal(signatures_of(texts), whole)


def test_short_and_wordless_documents() -> None:
    signatures = signatures_of(["two words", "Two, words!", "other words", "...", ""])
    assert np.array_equal(signatures[0], signatures[1]) and not np.array_equal(signatures[0], signatures[2])
    originals = near_originals(signatures, np.arange(5), 0.8)
    assert originals.tolist() == [0, 0, 2, 3, 4]  # documents without words are not copies of each other


def test_near_copies_are_clustered_like_all_pairs_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup, "_PIECE", 7)
    texts = [make_text(seed) for seed in range(40)]
    for seed in range(40):
        texts += [change(texts[seed], seed % 4, seed)] if seed % 2 else []
    signatures = signatures_of(texts)
    expected = list(range(len(texts)))
    for a in range(len(texts)):
        for b in range(a + 1, len(texts)):
            if np.mean(signatures[a] == signatures[b]) >= 0.8:
                merged = {expected[a], expected[b]}
                expected = [min(merged) if value in merged else value for value in expected]
    assert near_originals(signatures, np.arange(len(texts)), 0.8).tolist() == expected
    assert len(set(expected)) < 52


@pytest.mark.parametrize("workers", [1, 2])
def test_a_corpus_loses_its_copies_and_only_those(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "_BATCH", 500)
    texts = [make_text(seed) for seed in range(12)]
    first = write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": text} for text in texts])
    near = [change(texts[2], 1), texts[5], change(texts[7], 60), texts[5] + " ", make_text(99)]
    second = write_jsonl(tmp_path / "in" / "b.jsonl.gz", [{"text": text} for text in near])
    sources = [str(first), str(second)]

    exact = deduplicate(sources, tmp_path / "exact", ReadOptions(), workers=workers)
    assert (exact.documents, exact.exact_copies, exact.near_copies, exact.kept) == (17, 1, 0, 16)
    assert removed_lines(tmp_path / "exact") == [{"document": f"{second}:2", "copy_of": f"{first}:6", "exact": True}]

    report = deduplicate(sources, tmp_path / "near", ReadOptions(), threshold=0.8, workers=workers)
    assert (report.exact_copies, report.near_copies, report.kept) == (1, 2, 14)
    assert json.loads((tmp_path / "near" / "report.json").read_text())["kept"] == 14
    kept = [
        entry.text
        for name in ("a", "b")
        for entry in CorpusReader([str(tmp_path / "near" / f"{name}-00000.jsonl.zst")], ReadOptions())
    ]
    assert kept == [*texts, near[2], near[4]]
    lines = removed_lines(tmp_path / "near")
    assert [(line["document"], line["copy_of"], line["exact"]) for line in lines] == [
        (f"{second}:1", f"{first}:3", False),
        (f"{second}:2", f"{first}:6", True),
        (f"{second}:4", f"{first}:6", False),
    ]
    assert abs(float(str(lines[0]["similarity"])) - jaccard(texts[2], near[0])) < 0.15
    assert lines[2]["similarity"] == 1.0


# Letters of each script, marks among them.
UNSPACED = {
    "Chinese": [chr(code) for code in range(0x4E00, 0x4F00)],
    "Japanese": [chr(code) for code in range(0x3041, 0x3090)],
    "Thai": [chr(code) + mark for code in range(0x0E01, 0x0E2E) for mark in ("", "\u0e49", "\u0e34")],
    "Lao": [chr(code) for code in (*range(0x0E94, 0x0EA3), *range(0x0EA7, 0x0EAF))],
    "Khmer": [chr(code) + mark for code in range(0x1780, 0x17A0) for mark in ("", "\u17b6")],
    "Burmese": [chr(code) + mark for code in range(0x1000, 0x1020) for mark in ("", "\u102d")],
}


@pytest.mark.parametrize("script", UNSPACED)
def test_near_copies_in_scripts_without_spaces_are_removed(tmp_path: Path, script: str) -> None:
    source = random.Random(script)
    texts = ["".join(source.choices(UNSPACED[script], k=300)) for _ in range(6)]
    near = texts[2][:100] + texts[3][7] + texts[2][101:]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in [*texts, near, texts[4][:150]]])
    report = deduplicate([str(path)], tmp_path / "out", ReadOptions(), threshold=0.8, workers=1)
    assert (report.near_copies, report.kept) == (1, 7)
    (line,) = removed_lines(tmp_path / "out")
    assert (line["document"], line["copy_of"]) == (f"{path}:7", f"{path}:3")


@pytest.mark.parametrize("more", [2, 4, 5])
def test_a_corpus_that_changes_between_its_two_readings_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in ("one", "two", "one", "four")])

    def change(digests: np.ndarray) -> np.ndarray:
        write_jsonl(path, [{"text": f"other {number}"} for number in range(more)])
        return exact_originals(digests)

    monkeypatch.setattr(dedup, "exact_originals", change)
    with pytest.raises(DataError, match=r"a\.jsonl was changed while it was read"):
        deduplicate([str(path)], tmp_path / "out", ReadOptions(), workers=1)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("there", [False, True])
def test_temporary_files_are_where_the_corpus_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """Signatures and large documents need not fit the system's folder for temporary files."""
    path = write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": make_text(seed)} for seed in (1, 2, 1)])
    if there:
        (tmp_path / "new" / "out").mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    report = deduplicate([str(path)], tmp_path / "new" / "out", ReadOptions(), threshold=0.8, workers=1)
    assert report.kept == 2
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    assert not list((tmp_path / "new" / "out").glob(".*"))


def test_what_cannot_be_deduplicated_is_refused(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"text": ""}]))
    with pytest.raises(DataError, match=r"above 0 and at most 1, not 1\.5"):
        deduplicate([path], tmp_path / "out", ReadOptions(), threshold=1.5)
    with pytest.raises(DataError, match=r"no document to deduplicate; rejects: .*empty_document"):
        deduplicate([path], tmp_path / "out", ReadOptions())
    with pytest.raises(DataError, match="there is no file"):
        deduplicate([str(tmp_path / "nothing.jsonl")], tmp_path / "out", ReadOptions())


def test_the_law_has_near_copies_that_are_near_copies(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "train" / "dc_law.jsonl.zst"
    report = deduplicate([str(source)], tmp_path / "out", ReadOptions(), threshold=0.8, workers=2)
    assert report.documents == 9611 and report.near_copies > 100
    assert report.kept == report.documents - report.exact_copies - report.near_copies
    texts = {f"{entry.file}:{entry.line}": entry.text for entry in CorpusReader([str(source)], ReadOptions())}
    pairs = [line for line in removed_lines(tmp_path / "out") if not line["exact"]]
    exact = [jaccard(texts[str(line["document"])], texts[str(line["copy_of"])]) for line in pairs[:60]]
    assert np.mean(exact) > 0.8
    assert all(abs(float(str(line["similarity"])) - value) < 0.2 for line, value in zip(pairs, exact))
