"""Verification: a sound folder passes, and every kind of damage is found, in every shard at once."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import zstandard

from data_prep.reading import verify as module
from data_prep.reading.packed import sidecar
from data_prep.reading.verify import verify_dataset
from data_prep.tokenizing.packing import best_fit, write_packing
from tests.data_prep.support import EOD, VOCABULARY, make_documents, write_dataset
from tests.data_prep.writing import documents, run, write_jsonl

DOCUMENTS = make_documents(30, 1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "_PIECE", 8)  # so that every check crosses the seams between pieces
    shards = {"train": [("web", DOCUMENTS), ("web", make_documents(5, 2))], "test": [("web", make_documents(3, 3))]}
    return write_dataset(tmp_path / "data", shards)


def change_manifest(folder: Path, **parts: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **parts}))


def renew_checksums(folder: Path) -> None:
    """Let the manifest agree with the damaged files, so that only the check under test can find the damage."""
    splits = json.loads((folder / "manifest.json").read_text())["splits"]
    for split in splits.values():
        for shard in split["shards"]:
            for kind in ("bin", "idx"):
                shard[f"sha256_{kind}"] = hashlib.sha256((folder / f"{shard['name']}.{kind}").read_bytes()).hexdigest()
    change_manifest(folder, splits=splits)


def test_a_sound_folder_passes(folder: Path) -> None:
    done: list[tuple[str, int]] = []
    report = verify_dataset(folder, progress=lambda name, tokens: done.append((name, tokens)))
    assert report.ok and report.problems == []
    assert (report.shards, report.documents) == (3, 38)
    assert report.tokens == sum(tokens for _, tokens in done)
    assert sorted(name for name, _ in done) == ["test-00000", "train-00000", "train-00001"]


IDS = [token for document in DOCUMENTS for token in document]
INNER = next(n for n, token in enumerate(IDS) if token != EOD and n > 20)
LAST = sum(map(len, DOCUMENTS[:18])) - 1  # END_OF_DOCUMENT of document 17


@pytest.mark.parametrize(
    ("place", "value", "expected"),
    [
        (INNER, VOCABULARY, [f"1 ids are outside the vocabulary of 1000, the first is 1000 at token {INNER}"]),
        (
            LAST,
            5,
            ["29 END_OF_DOCUMENT ids", "1 documents do not end with END_OF_DOCUMENT (0), the first is document 17"],
        ),
        (INNER, EOD, ["31 END_OF_DOCUMENT ids (0) for 30 documents"]),
    ],
    ids=["outside the vocabulary", "no end", "an end inside"],
)
def test_a_wrong_id_is_found(folder: Path, place: int, value: int, expected: list[str]) -> None:
    path = folder / "train-00000.bin"
    ids = np.frombuffer(path.read_bytes(), "<u2").copy()
    ids[place] = value
    path.write_bytes(ids.tobytes())
    renew_checksums(folder)
    problems = verify_dataset(folder).problems
    assert len(problems) == len(expected) and all(text in problem for text, problem in zip(expected, problems))


@pytest.mark.parametrize(
    ("position", "kind", "value", "sentence"),
    [
        (34 + 4 * 12, "<i", -4, "sequence 12 has a negative length"),
        (34 + 4 * 12, "<i", 1000, "sequence 13 begins at byte"),
        (34 + 4 * 30 + 8 * 3, "<q", 2**50, "sequence 3 begins at byte 1125899906842624"),
        (34 + 12 * 30 + 8 * 9, "<q", 2, "document entries do not rise from 0 to 30"),
        (34 + 12 * 30, "<q", 1, "document entries do not rise from 0 to 30"),
        (34 + 12 * 30 + 8 * 9, "<q", -(2**60), "document entries do not rise from 0 to 30"),
        (34 + 12 * 30 + 8 * 16, "<q", 2**60, "document entries do not rise from 0 to 30"),
        # Document 9 loses its sequence to document 8.
        (34 + 12 * 30 + 8 * 9, "<q", 10, "do not end with END_OF_DOCUMENT (0), the first is document 9"),
    ],
)
def test_a_wrong_index_is_found(folder: Path, position: int, kind: str, value: int, sentence: str) -> None:
    path = folder / "train-00000.idx"
    raw = bytearray(path.read_bytes())
    struct.pack_into(kind, raw, position, value)
    path.write_bytes(raw)
    renew_checksums(folder)
    (problem,) = verify_dataset(folder).problems
    assert sentence in problem and "train-00000" in problem


def test_problems_of_all_shards_are_collected(folder: Path) -> None:
    (folder / "train-00000.bin").unlink()
    raw = bytearray((folder / "test-00000.bin").read_bytes())
    raw[0] ^= 1
    (folder / "test-00000.bin").write_bytes(raw)
    splits = json.loads((folder / "manifest.json").read_text())["splits"]
    splits["train"]["shards"] += splits["train"]["shards"][:1]
    change_manifest(folder, splits=splits)
    problems = verify_dataset(folder).problems
    assert any("lists shard train-00000 twice" in problem for problem in problems)
    assert any("train-00000.bin is missing" in problem for problem in problems)
    assert any("test-00000.bin has changed since it was written" in problem for problem in problems)


def test_wrong_counts_of_a_source_are_found(folder: Path) -> None:
    tokens = verify_dataset(folder).tokens
    source = {"name": "web", "documents": 38, "tokens": tokens, "text_bytes": 4 * tokens}
    change_manifest(folder, sources=[source])
    assert verify_dataset(folder).ok
    change_manifest(folder, sources=[{**source, "documents": 40}])
    (problem,) = verify_dataset(folder).problems
    assert "counts 40 documents of source web, its shards have 38" in problem


def test_damaged_packings_are_found(folder: Path) -> None:
    change_manifest(folder, settings={"packing": "best-fit", "sequence_length": 16})
    assert sum("has no packing for length 16" in problem for problem in verify_dataset(folder).problems) == 3
    for name in ("train-00000", "train-00001", "test-00000"):
        write_packing(folder / name, 16)
    assert verify_dataset(folder).problems == []
    path = sidecar(folder / "train-00000", 16, "pieces")
    pieces = np.load(path)
    np.save(path, pieces + np.eye(*pieces.shape, dtype=np.int64))
    assert any("does not hold every token once" in problem for problem in verify_dataset(folder).problems)
    np.save(path, pieces)
    path = sidecar(folder / "train-00000", 16, "sequences")
    sequences = np.load(path)
    np.save(path, np.concatenate([sequences[:3], sequences[4:]]))
    (problem,) = verify_dataset(folder).problems
    assert "overfills a sequence" in problem
    # As it was written for the same shard before its documents were put in another order.
    other = best_fit([len(document) for document in reversed(DOCUMENTS)], 17)
    np.save(sidecar(folder / "train-00000", 16, "pieces"), other.pieces)
    np.save(path, other.sequences)
    (problem,) = verify_dataset(folder).problems
    assert "the packing for length 16 is of other documents" in problem


def test_held_out_text_that_is_not_that_of_the_shards_is_found(tmp_path: Path, byte_bpe: Path) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", documents(200))
    out = tmp_path / "out"
    run([corpus], out, byte_bpe, validation=0.2, test=0.2)
    assert verify_dataset(out).problems == []
    test, validation = (out / "held_out" / f"{name}.jsonl.zst" for name in ("test", "validation"))
    text = zstandard.ZstdDecompressor().decompressobj().decompress(test.read_bytes())
    test.write_bytes(zstandard.compress(text[text.index(b"\n") + 1 :]))
    validation.write_bytes(validation.read_bytes()[:-9])
    wrong = verify_dataset(out).problems
    count = text.count(b"\n")
    assert len(wrong) == 2 and "validation.jsonl.zst: .zst data is broken" in wrong[0]
    assert wrong[1].endswith(f"test.jsonl.zst has {count - 1} documents, the split test has {count}.")
    test.unlink()
    assert any("test.jsonl.zst cannot be opened: No such file" in problem for problem in verify_dataset(out).problems)
