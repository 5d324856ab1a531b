"""The commands for corpora and token files of other stacks, as a person calls them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from data_prep.cli import app
from data_prep.corpora import corpus
from data_prep.corpora.corpus import CorpusReader, CorpusWriter
from data_prep.errors import DataError
from data_prep.sources.base import ReadOptions
from tests.data_prep.support import write_jsonl


def call(*arguments: object, text: str | None = None) -> Result:
    result = CliRunner().invoke(app, list(map(str, arguments)), input=text)
    if isinstance(result.exception, DataError):
        raise result.exception
    return result


def test_import_verify_and_export(tmp_path: Path, byte_bpe: Path) -> None:
    np.array([0, 70, 71, 0, 72, 0], "<u2").tofile(tmp_path / "train.bin")
    result = call("import", "nanogpt", tmp_path / "train.bin", "--out", tmp_path / "data", "--tokenizer", byte_bpe)
    assert result.exit_code == 0, result.output
    assert "train: 2 documents, 5 tokens in 1 shard(s)" in result.stdout
    assert "1 empty ones were left out" in result.stdout
    assert call("verify", tmp_path / "data").exit_code == 0
    result = call("export", tmp_path / "data", "--out", tmp_path / "neox")
    assert f"{tmp_path / 'neox' / 'train_text_document'} (2 documents, 5 tokens)" in result.stdout
    with pytest.raises(DataError, match="not empty"):
        call("export", tmp_path / "data", "--out", tmp_path / "neox")


def test_dedup_from_standard_input_and_decontaminate_what_it_wrote(tmp_path: Path) -> None:
    passage = " ".join(f"word{number}" for number in range(40))
    texts = ["first text", passage, "first text", passage + " x", "last"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    result = call("dedup", "-", "--out", tmp_path / "clean", "--near", 0.8, "--workers", 1, text=lines)
    assert result.exit_code == 0, result.output
    assert "3 of 5 documents kept; 1 exact and 1 near copies removed" in result.stdout
    evaluation = write_jsonl(tmp_path / "eval.jsonl", [{"q": passage}])
    clean, out = tmp_path / "clean", tmp_path / "out"
    result = call("decontaminate", clean, "--out", out, "--against", evaluation, "--workers", 1)
    assert result.exit_code == 0, result.output
    assert "2 of 3 documents kept, 1 removed" in result.stdout
    assert "could not be read" not in result.stdout
    for source in (out, out / "*", out / "*.zst"):
        reader = CorpusReader([str(source)], ReadOptions())
        assert [entry.text for entry in reader] == ["first text", "last"] and not reader.rejects
    assert f"{evaluation}: half or more found of 1 of 1 items" in result.stdout


def test_a_part_of_a_corpus_is_refused_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_PART", 100)
    whole = write_jsonl(tmp_path / "in.jsonl", [{"text": f"text number {number}"} for number in range(50)])
    out = tmp_path / "out"
    writer = CorpusWriter(out, ReadOptions())
    writer.__enter__()  # what a kill leaves is what is there without the end of the block
    for entry in CorpusReader([str(whole)], ReadOptions()):
        writer.write(entry)
    parts = sorted(out.glob("*.jsonl.zst"))
    assert len(parts) > 2
    for source in (out, out / "*", parts[0]):
        with pytest.raises(DataError, match=r"out holds a part of a corpus: `dedup` or `decontaminate` .* was stopped"):
            CorpusReader([str(source)], ReadOptions())
    writer.__exit__(None, None, None)
    assert len(list(CorpusReader([str(out)], ReadOptions()))) == 50


def test_a_data_set_is_no_corpus(tmp_path: Path, byte_bpe: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": f"text number {number}"} for number in range(50)])
    arguments = ("--tokenizer", byte_bpe, "--validation", 0.2, "--workers", 1)
    assert call("tokenize", source, "--out", tmp_path / "all" / "data", *arguments).exit_code == 0
    for again in (tmp_path / "all", tmp_path / "all" / "data", tmp_path / "all" / "data" / "*"):
        with pytest.raises(DataError, match=r"all/data is a data set that `tokenize` wrote, not a corpus"):
            call("tokenize", again, "--out", tmp_path / "again", *arguments)
    held_out = tmp_path / "all" / "data" / "held_out"
    assert call("tokenize", held_out, "--out", tmp_path / "own", *arguments).exit_code == 0


def test_what_cannot_be_read_shows_in_the_exit_code(tmp_path: Path) -> None:
    records: list[object] = [{"text": f"text {number}"} for number in range(200)]
    few = write_jsonl(tmp_path / "few.jsonl", [*records, {"other": 1}])
    result = call("dedup", few, "--out", tmp_path / "a", "--workers", 1)
    assert result.exit_code == 0 and "could not be read: 1 missing_field" in result.stdout
    many = write_jsonl(tmp_path / "many.jsonl", [*records, *[{"other": 1}] * 5])
    assert call("dedup", many, "--out", tmp_path / "b", "--workers", 1).exit_code == 1
    broken = write_jsonl(tmp_path / "broken.jsonl.gz", records)
    broken.write_bytes(broken.read_bytes()[:-20])
    assert call("dedup", broken, few, "--out", tmp_path / "c", "--workers", 1).exit_code == 1


@pytest.mark.parametrize("command", ["dedup", "decontaminate"])
def test_what_a_person_should_know_of_the_sources_is_said(tmp_path: Path, command: str) -> None:
    (tmp_path / "a.txt").write_text(" ".join(f"word{number}" for number in range(20)))
    more = ("--against", tmp_path / "a.txt") if command == "decontaminate" else ()
    sources = (tmp_path / "a.txt", tmp_path / "." / "a.txt", "--separator", "\\r\\n")
    result = call(command, *sources, "--out", tmp_path / "out", "--workers", 1, *more)
    assert result.exit_code == 0, result.output
    assert f"note: what is given again is read once (1 left out, the first: {tmp_path / 'a.txt'})" in result.stderr
    assert "the separator '\\r\\n' is not in the first 8 MB" in result.stderr
    assert len(json.loads((tmp_path / "out" / "report.json").read_text())["notices"]) == 2
