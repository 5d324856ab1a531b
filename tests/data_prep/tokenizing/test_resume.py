"""Runs that are taken up again: after a repair of the corpus, and after a kill in the very last moment."""

from __future__ import annotations

import gzip
import json
import os

import pytest

from data_prep.errors import DataError
from data_prep.reading.manifest import read_manifest
from data_prep.sources import python_docs
from data_prep.tokenizing import merge
from data_prep.tokenizing.piece_schedule import Share
from data_prep.tokenizing.pipeline import merge_tasks, tokenize
from data_prep.tokenizing.shard_plan import WORK
from tests.data_prep.writing import Quiet, digest, documents, job, jsonl, run, write_jsonl

PIECE = 4000


@pytest.fixture
def corpus(tmp_path):
    """Three files of several pieces each, the second one broken off; and its whole bytes."""
    folder = tmp_path / "corpus"
    for number, suffix in enumerate([".jsonl", ".jsonl.gz", ".jsonl.gz"]):
        write_jsonl(folder / f"{number}{suffix}", documents(400, number))
    broken = folder / "1.jsonl.gz"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    return folder, broken, whole


def test_only_a_file_that_was_repaired_is_done_again(corpus, byte_bpe, tmp_path):
    folder, broken, whole = corpus
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"1 broken_compression.*Repair what is broken"):
        run([folder], out, byte_bpe, piece_bytes=PIECE)
    before = {path.name for path in out.glob("train-*.bin")}
    for name in before:
        os.utime(out / name, (1, 1))  # what is written anew is of today
    broken.write_bytes(whole)
    with pytest.raises(DataError, match="split_seed: 0 -> 1"):
        run([folder], out, byte_bpe, piece_bytes=PIECE, split_seed=1)
    listener = Quiet()
    tokenize(job([folder], out, byte_bpe, piece_bytes=PIECE), listener)
    assert any("files have changed since" in line for line in listener.said)
    kept = [path for path in out.glob("train-*.bin") if path.stat().st_mtime == 1]
    assert {path.name[6:11] for path in kept} == {"00000", "00002"}
    assert len(kept) == sum(name[6:11] != "00001" for name in before)
    run([folder], tmp_path / "fresh", byte_bpe, piece_bytes=PIECE)
    assert digest(out) == digest(tmp_path / "fresh")


def test_a_file_that_became_shorter_leaves_no_piece_behind(corpus, byte_bpe, tmp_path):
    folder, broken, whole = corpus
    out = tmp_path / "out"
    with pytest.raises(DataError, match="1 broken_compression"):
        run([folder], out, byte_bpe, piece_bytes=PIECE)
    broken.write_bytes(whole)
    write_jsonl(folder / "0.jsonl", documents(100, 0))
    run([folder], out, byte_bpe, workers=2, piece_bytes=PIECE)
    run([folder], tmp_path / "fresh", byte_bpe, piece_bytes=PIECE)
    assert digest(out) == digest(tmp_path / "fresh")


@pytest.mark.parametrize("name", ["0.jsonl", "2.jsonl.gz"])
def test_a_file_replaced_by_one_of_its_size_is_read_again(corpus, byte_bpe, tmp_path, name):
    folder, broken, whole = corpus
    path, out = folder / name, tmp_path / "out"
    texts = documents(400, int(name[0]))
    if name.endswith(".gz"):  # stored, so that another text has the same size
        path.write_bytes(gzip.compress(jsonl(texts), 0, mtime=0))
    size = path.stat().st_size
    with pytest.raises(DataError, match="1 broken_compression"):
        run([folder], out, byte_bpe, piece_bytes=PIECE)
    broken.write_bytes(whole)
    texts[7], texts[300] = texts[300], texts[7]
    path.write_bytes(jsonl(texts) if name.endswith("l") else gzip.compress(jsonl(texts), 0, mtime=0))
    assert path.stat().st_size == size
    run([folder], out, byte_bpe, piece_bytes=PIECE)
    run([folder], tmp_path / "fresh", byte_bpe, piece_bytes=PIECE)
    assert digest(out) == digest(tmp_path / "fresh")


def test_small_files_that_are_grouped_otherwise_are_done_again(byte_bpe, tmp_path):
    folder = tmp_path / "corpus"
    for number in range(12):
        write_jsonl(folder / f"{number:02d}.jsonl", documents(20, number))
    (folder / "06.jsonl").write_bytes(b"broken\n" * 300)
    out = tmp_path / "out"
    with pytest.raises(DataError, match="300 invalid_json"):
        run([folder], out, byte_bpe, piece_bytes=12_000)
    write_jsonl(folder / "06.jsonl", documents(200, 6))
    run([folder], out, byte_bpe, piece_bytes=12_000)
    run([folder], tmp_path / "fresh", byte_bpe, piece_bytes=12_000)
    assert digest(out) == digest(tmp_path / "fresh")
    assert len({path.name[6:11] for path in out.glob("train-*.bin")}) > 3


@pytest.mark.parametrize("again", ["tokenize", "merge"])
def test_a_kill_between_the_manifest_and_the_end_is_cleaned_up(byte_bpe, tmp_path, monkeypatch, again):
    source = write_jsonl(tmp_path / "a.jsonl", documents(200))
    more = {"piece_bytes": PIECE, "shuffle_seed": 1}
    run([source], tmp_path / "undisturbed", byte_bpe, **more)
    out = tmp_path / "out"

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge, "remove_leftovers", killed)
    with pytest.raises(KeyboardInterrupt):
        run([source], out, byte_bpe, **more)
    monkeypatch.undo()
    assert (out / "manifest.json").exists() and (out / ".work").exists()
    assert digest(out) != digest(tmp_path / "undisturbed")
    if again == "tokenize":
        run([source], out, byte_bpe, **more)
    else:
        merge_tasks(out)
    assert not (out / ".work").exists()
    assert digest(out) == digest(tmp_path / "undisturbed")


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "link"])
@pytest.mark.parametrize("place", ["held_out", "shard", "tokenizer"])
def test_what_an_unfinished_run_names_lies_in_its_folder(byte_bpe, tmp_path, place, name):
    source = write_jsonl(tmp_path / "a.jsonl", documents(40))
    out = tmp_path / "out"
    tokenize(job([source], out, byte_bpe, validation=0.2), Quiet(), share=Share(0, 1))
    (tmp_path / "secret").write_text("secret")
    (out / WORK / "link").symlink_to(tmp_path / "secret")
    (out / "link").symlink_to(tmp_path / "secret")
    file = out / WORK / ("plan.json" if place == "tokenizer" else "piece-00000-00000.json")
    value = json.loads(file.read_text())
    if place == "tokenizer":
        value["tokenizer"]["file"] = name
    elif place == "shard":
        value["shards"]["train"][0]["name"] = name
    else:
        value["held_out"]["validation"] = name
    file.write_text(json.dumps(value))
    with pytest.raises(
        DataError, match=r"(not the name of a file inside|leads out of|not a plain file name|is missing)"
    ):
        merge_tasks(out)


def test_held_out_text_that_was_cut_off_is_said(byte_bpe, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", documents(40))
    out = tmp_path / "out"
    tokenize(job([source], out, byte_bpe, validation=0.2), Quiet(), share=Share(0, 1))
    held_out = out / WORK / "held_out-validation-00000-00000.jsonl.zst"
    held_out.write_bytes(held_out.read_bytes()[:-20])
    with pytest.raises(DataError, match="ends inside a frame; remove"):
        merge_tasks(out)
    assert not (out / "manifest.json").exists()


def test_the_corpus_without_files_is_taken_up_again(byte_bpe, tmp_path, monkeypatch):
    texts = documents(40)
    monkeypatch.setattr(python_docs, "iter_documents", lambda: ((f"{n}", text) for n, text in enumerate(texts)))
    out = tmp_path / "out"
    arguments = job(["python-docs", write_jsonl(tmp_path / "a.jsonl", texts[:5])], out, byte_bpe, validation=0, test=0)
    tokenize(arguments, Quiet(), share=Share(0, 2))
    tokenize(arguments, Quiet(), share=Share(1, 2))
    merge_tasks(out)
    assert read_manifest(out).splits["train"].documents == 45
