"""The commands for corpora and token files of other stacks, as a person calls them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from data_prep.cli import app
from data_prep.errors import DataError
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
    (written,) = (tmp_path / "clean").glob("*-00000.jsonl.zst")
    result = call("decontaminate", written, "--out", tmp_path / "out", "--against", evaluation, "--workers", 1)
    assert result.exit_code == 0, result.output
    assert "2 of 3 documents kept, 1 removed" in result.stdout
    assert f"{evaluation}: half or more found of 1 of 1 items" in result.stdout


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
