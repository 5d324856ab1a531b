"""Reading corpora in order with several processes, and writing them so that they read the same again."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_prep.corpora import corpus as module
from data_prep.corpora.corpus import CorpusReader, CorpusWriter, Entry, map_entries
from data_prep.corpora.decontaminate import decontaminate
from data_prep.corpora.dedup import deduplicate
from data_prep.corpora.evaluation_texts import EvaluationIndex
from data_prep.errors import DataError
from data_prep.sources.base import ReadOptions
from tests.data_prep.support import write_jsonl


def lengths(factor: int, batch: list[Entry]) -> list[int]:
    """In a process of its own Ctrl-C, which a terminal sends to all processes, is left to the parent."""
    if multiprocessing.parent_process() is not None:
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    return [factor * len(entry.text) for entry in batch]


def test_documents_come_in_order_with_their_places(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl.zst", [{"text": "one"}, {"text": "two"}])
    second = write_jsonl(tmp_path / "b.jsonl.gz", [{"other": 1}, {"text": "three"}])
    reader = CorpusReader([str(first), str(second)], ReadOptions())
    for _ in range(2):
        found = [(entry.number, entry.source, entry.file, entry.line, entry.text) for entry in reader]
        assert found == [
            (0, "a", str(first), 1, "one"),
            (1, "a", str(first), 2, "two"),
            (2, "b", str(second), 2, "three"),
        ]
        assert dict(reader.rejects) == {"missing_field": 1}
        assert reader.examples == [f"{second}:1: missing_field: no field 'text'"]


def test_a_broken_file_is_a_counted_reject_and_the_rest_is_read(tmp_path: Path) -> None:
    whole = write_jsonl(tmp_path / "a.jsonl.gz", [{"text": "x" * 1000}] * 50)
    whole.write_bytes(whole.read_bytes()[:-40])
    other = write_jsonl(tmp_path / "b.jsonl", [{"text": "kept"}])
    reader = CorpusReader([str(whole), str(other)], ReadOptions())
    assert [entry.text for entry in reader][-1] == "kept"
    assert set(reader.rejects) == {"broken_compression"}


@pytest.mark.parametrize("workers", [1, 3])
def test_work_in_processes_keeps_the_order(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH", 50)
    texts = ["x" * (number * 7 % 31 + 1) for number in range(200)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    results = list(map_entries(CorpusReader([str(path)], ReadOptions()), lengths, workers, 10))
    assert [entry.number for entry, _ in results] == list(range(200))
    assert [result for _, result in results] == [10 * len(text) for text in texts]


def die(_shared: None, batch: list[Entry]) -> list[None]:
    if any(entry.number == 40 for entry in batch):
        os.kill(os.getpid(), signal.SIGKILL)
    return [None] * len(batch)


def test_a_killed_process_is_said_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH", 50)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * 20} for _ in range(200)])
    with pytest.raises(DataError, match="was killed; out of memory is the usual reason: use fewer --workers"):
        list(map_entries(CorpusReader([str(path)], ReadOptions()), die, 2, None))


def test_what_is_written_reads_the_same_with_the_same_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PART", 40)
    records = [
        {"content": {"body": f'tëxt \u2028 "quoted" \\ number {number}'}, "meta": {"pile_set_name": "Books3"}}
        for number in range(6)
    ]
    path = write_jsonl(tmp_path / "the pile.jsonl", records)
    options = ReadOptions(text_field="content.body", subset_field="meta.pile_set_name")
    entries = list(CorpusReader([str(path)], options))
    with CorpusWriter(tmp_path / "out", options) as writer:
        for entry in entries:
            writer.write(entry)
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == [f"the_pile-{number:05d}.jsonl.zst" for number in range(3)]
    again = list(CorpusReader([str(file) for file in files], options))
    assert [(entry.text, entry.subset) for entry in again] == [(entry.text, entry.subset) for entry in entries]
    assert (writer.documents, writer.text_bytes) == (6, sum(len(entry.text.encode()) for entry in entries))


def test_the_other_fields_of_a_record_stay(tmp_path: Path) -> None:
    """A later command may use fields that the first one was not told of."""
    meta = {"pile_set_name": "Books3", "score": 0.1}
    fields = {"id": 2**60, "meta": meta, "\x00text\x00": ["text", None, {"text": "x"}]}
    texts = [f"text number {number} of " + "many " * 20 for number in range(4)]
    path = write_jsonl(tmp_path / "in.jsonl", [{"text": text, **fields} for text in [*texts, texts[1]]])
    deduplicate([str(path)], tmp_path / "unique", ReadOptions(), workers=1)
    evaluation = write_jsonl(tmp_path / "eval.jsonl", [{"q": texts[2]}])
    decontaminate([str(tmp_path / "unique")], [evaluation], tmp_path / "clean", ReadOptions(), n=6, workers=1)
    expected = [{"text": text, **fields} for text in texts]
    assert written(tmp_path / "unique") == expected
    assert written(tmp_path / "clean") == expected[:2] + expected[3:]
    options = ReadOptions(subset_field="meta.pile_set_name", subsets=("Books3",))
    assert [entry.subset for entry in CorpusReader([str(tmp_path / "clean")], options)] == ["Books3"] * 3


def test_a_value_too_deep_for_its_column_is_a_broken_file(tmp_path: Path) -> None:
    """Python's dates end in the year 9999, and those within other values are not turned into text."""
    dates = pyarrow.array([[10_000_000]], pyarrow.list_(pyarrow.int32())).cast(pyarrow.list_(pyarrow.date32()))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"], "dates": dates}), tmp_path / "in.parquet")
    reader = CorpusReader([str(tmp_path / "in.parquet")], ReadOptions())
    assert list(reader) == [] and reader.rejects == {"broken_compression": 1}
    with pytest.raises(DataError, match=r"in\.parquet cannot be read after row 0: .*out of range"):
        EvaluationIndex([tmp_path / "in.parquet"], 1)


def test_the_other_columns_of_a_table_stay(tmp_path: Path) -> None:
    rows = {
        "doc.text": ["one", "two", "one"],
        "doc.id": [1, 2, 3],
        "meta.set": ["a", "b", "a"],
        "when": pyarrow.array([0, 10**18 + 1, 5], pyarrow.timestamp("ns")),
        "day": pyarrow.array([0, 10_000_000, 5], pyarrow.int32()).cast(pyarrow.date32()),
        "price": [Decimal("1.50"), None, Decimal("2.00")],
        "image": [b"\xff\x00", b"", None],
        "odd": [float("nan"), 0.5, 1.0],
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "in.parquet")
    deduplicate([str(tmp_path / "in.parquet")], tmp_path / "out", ReadOptions(text_field="doc.text"), workers=1)
    first, second = written(tmp_path / "out")
    assert first["doc"] == {"id": 1, "text": "one"} and second["doc"] == {"id": 2, "text": "two"}
    assert (first["meta"], first["price"], first["image"], first["odd"]) == ({"set": "a"}, "1.50", "/wA=", None)
    assert second["when"].endswith(".000000001") and second["price"] is None
    assert (first["day"], second["day"]) == ("1970-01-01", "29349-01-26")
    options = ReadOptions(text_field="doc.text", subset_field="meta.set")
    assert [(e.text, e.subset) for e in CorpusReader([str(tmp_path / "out")], options)] == [("one", "a"), ("two", "b")]


def test_fields_that_cannot_be_written_again_are_a_reject(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "deep", "x": ' + "[" * 500 + "]" * 500 + '}\n{"text": "kept"}\n')
    report = deduplicate([str(tmp_path / "a.jsonl")], tmp_path / "out", ReadOptions(), workers=1)
    assert report.rejects == {"invalid_json": 1} and written(tmp_path / "out") == [{"text": "kept"}]


def written(folder: Path) -> list[dict[str, Any]]:
    """What a corpus holds, by the JSON parser."""
    (path,) = folder.glob("*-00000.jsonl.zst")
    data = zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read()
    return [json.loads(line) for line in data.splitlines()]


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PART", 1)
    entry = Entry(0, "s", "f", 1, None, "text")
    with pytest.raises(RuntimeError), CorpusWriter(tmp_path / "out", ReadOptions()) as writer:
        writer.write(entry)
        monkeypatch.setattr(module, "_PART", 1000)
        writer.write(entry)
        raise RuntimeError
    assert list((tmp_path / "out").iterdir()) == []
