"""`tokenize` from end to end against plain loops over the tokenizers' own libraries."""

from __future__ import annotations

import io
import json
import resource
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import xxhash
import zstandard

from data_prep.errors import DataError
from data_prep.reading.dataset import open_dataset
from data_prep.reading.manifest import read_manifest
from data_prep.reading.verify import verify_dataset
from data_prep.sources.base import ReadOptions
from data_prep.tokenizing import cutting
from data_prep.tokenizing.pipeline import tokenize
from tests.data_prep.support import read_index_independently
from tests.data_prep.writing import Quiet, command, compressed, documents, invoke, job, jsonl, run, write_jsonl

PIECE = 4000  # bytes of text: small enough for many pieces


def encoder(path: Path):
    """text -> ids with END_OF_DOCUMENT, by the tokenizer's own library."""
    if path.suffix == ".model":
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        return lambda text: [*model.encode(text), model.eos_id()]
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    eod = tokenizer.token_to_id("<|endoftext|>")
    return lambda text: [*tokenizer.encode(text, add_special_tokens=False).ids, eod]


def split_of(text: str, validation: float, test: float, seed: int = 0) -> str:
    share = xxhash.xxh3_64_intdigest(text.encode(), seed) / 2**64
    return "test" if share < test else "validation" if share < test + validation else "train"


def written(folder: Path, split: str, source: str | None = None) -> list[list[int]]:
    """Documents of a split, read by the format's table."""
    manifest = read_manifest(folder)
    shards = manifest.splits[split].shards if split in manifest.splits else ()
    return [
        document
        for shard in shards
        if source in (None, shard.source)
        for document in read_index_independently(folder / shard.name)
    ]


def held_out(folder: Path, split: str) -> list[dict]:
    raw = (folder / "held_out" / f"{split}.jsonl.zst").read_bytes()
    # One frame: a reader that stops at the first frame's end reads everything.
    data = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(raw), read_across_frames=False).read()
    return [json.loads(line) for line in data.splitlines()]


@pytest.mark.parametrize("kind", ["byte_bpe", "sentencepiece_model"])
@pytest.mark.parametrize("suffix", ["", ".zst"])
def test_every_document_is_in_its_split_with_the_librarys_ids(tmp_path, request, kind, suffix):
    tokenizer = request.getfixturevalue(kind)
    texts = documents(400)
    source = write_jsonl(tmp_path / f"a.jsonl{suffix}", texts)
    out = tmp_path / "out"
    manifest = run([source], out, tokenizer, validation=0.1, test=0.05, piece_bytes=PIECE)
    encode = encoder(tokenizer)
    for split in ("train", "validation", "test"):
        wanted = [text for text in texts if split_of(text, 0.1, 0.05) == split]
        assert written(out, split) == [encode(text) for text in wanted], split
        assert manifest.splits[split].documents == len(wanted)
        assert manifest.splits[split].text_bytes == sum(len(text.encode()) for text in wanted)
        if split != "train":
            assert [line["text"] for line in held_out(out, split)] == wanted
            assert {line["source"] for line in held_out(out, split)} == {"a"}
    assert len(manifest.splits["train"].shards) > 5
    assert verify_dataset(out).problems == []
    assert not (out / ".work").exists() and not (out / "rejects.jsonl").exists()
    assert sum(sum(counts) for counts in manifest.statistics["lengths_log2"].values()) == 400


def test_splits_stay_when_documents_are_added(tmp_path, byte_bpe):
    texts = documents(200)
    for name, some in (("some", texts[:100]), ("all", texts)):
        run([write_jsonl(tmp_path / f"{name}.jsonl", some)], tmp_path / name, byte_bpe, validation=0.2, test=0.1)
    for split in ("validation", "test"):
        few, many = ([line["text"] for line in held_out(tmp_path / name, split)] for name in ("some", "all"))
        assert [text for text in many if text in set(texts[:100])] == few


def test_lengths_are_filtered_and_counted(tmp_path, byte_bpe):
    texts = ["é" * 5, "é" * 10, "é" * 20]
    options = ReadOptions(minimum_bytes=20, maximum_bytes=39)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = run([source], tmp_path / "out", byte_bpe, options=options, validation=0, test=0)
    assert written(tmp_path / "out", "train") == [encoder(byte_bpe)(texts[1])]
    assert manifest.statistics["filtered"] == {"length": 2}


def test_pile_subsets_become_sources_of_their_own(tmp_path, byte_bpe):
    rows = [
        (text, ["Pile-CC", "USPTO Backgrounds", "uspto_backgrounds"][n % 3]) for n, text in enumerate(documents(90))
    ]
    path = tmp_path / "00.jsonl.zst"
    lines_ = [json.dumps({"text": text, "meta": {"pile_set_name": name}}) for text, name in rows]
    path.write_bytes(compressed("\n".join(lines_).encode(), ".zst"))
    options = ReadOptions(subset_field="meta.pile_set_name")
    run([path], tmp_path / "out", byte_bpe, options=options, validation=0, test=0, piece_bytes=PIECE)
    for name in ("Pile-CC", "USPTO Backgrounds", "uspto_backgrounds"):
        wanted = [encoder(byte_bpe)(text) for text, own in rows if own == name]
        assert written(tmp_path / "out", "train", name) == wanted
        assert open_dataset(tmp_path / "out").only(name).num_documents == 30


def test_subsets_with_long_names_and_too_many_of_them(tmp_path, byte_bpe):
    names = ["n" * 300, "n" * 299 + "m", *(f"site{number}.example.org" for number in range(120))]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(jsonl([f"text {number}"], subset=name) for number, name in enumerate(names)))
    shared = ["tokenize", path, "--tokenizer", byte_bpe, "--subset-field", "subset", "--validation", 0, "--test", 0]
    command(*shared, "--out", tmp_path / "out", "--workers", 1)
    assert {entry["name"] for entry in read_manifest(tmp_path / "out").sources} == set(names)
    for number in (0, 1, 2):
        assert written(tmp_path / "out", "train", names[number]) == [encoder(byte_bpe)(f"text {number}")]
    few = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))  # noqa: E731
    failed = command(*shared, "--out", tmp_path / "few", "--workers", 1, check=False, preexec_fn=few)
    assert failed.returncode == 2 and "the field 'subset' names more than " in failed.stderr


@pytest.mark.parametrize("kind", ["byte_bpe", "sentencepiece_model"])
def test_enormous_documents_are_encoded_in_parts_with_the_ids_of_the_whole(tmp_path, request, kind, monkeypatch):
    tokenizer = request.getfixturevalue(kind)
    monkeypatch.setattr(cutting, "PART", 300)
    monkeypatch.setattr(cutting, "_FARTHEST", 1200)
    texts = [*documents(20), "\n".join(documents(100, 3)), *documents(5, 4), "\n".join(documents(80, 5))]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    run([source], tmp_path / "out", tokenizer, validation=0.3, test=0, split_seed=3)
    encode = encoder(tokenizer)
    for split in ("train", "validation"):
        wanted = [text for text in texts if split_of(text, 0.3, 0, 3) == split]
        assert written(tmp_path / "out", split) == [encode(text) for text in wanted]
    assert [line["text"] for line in held_out(tmp_path / "out", "validation")] == [
        text for text in texts if split_of(text, 0.3, 0, 3) == "validation"
    ]


def test_nothing_usable_is_an_error_not_an_empty_data_set(tmp_path, byte_bpe):
    (tmp_path / "a.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match="no document that could be used"):
        run([tmp_path / "a.jsonl"], tmp_path / "out", byte_bpe)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_command_line(tmp_path, byte_bpe, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", documents(50))
    out = tmp_path / "out"
    done = command("tokenize", source, "--out", out, "--tokenizer", byte_bpe, "--workers", 2)
    assert "train: 5" in done.stdout or "train: 4" in done.stdout
    assert "\r" not in done.stderr and "\x1b" not in done.stderr, "no progress bar away from a terminal"
    wrong = command("tokenize", tmp_path / "none", "--out", out, "--tokenizer", byte_bpe, check=False)
    assert wrong.returncode == 2 and "there is no file" in wrong.stderr and "Traceback" not in wrong.stderr
    for arguments, said in (
        (("tokenize", source, "--out", out, "--tokenizer", byte_bpe), "nothing to do"),
        (("verify", out), "in order"),
        (("stats", out, "--picture", tmp_path / "l.png"), "tokens per document"),
        (("inspect", out, "--document", 0), "complete to END_OF_DOCUMENT"),
        (("inspect", out, "--sequence", 1, "--length", 20), "sequence 1 of"),
    ):
        invoke(*arguments)
        assert said in "".join(capsys.readouterr()), arguments
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")
    shard = next(out.glob("train*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])
    assert command("verify", out, check=False).returncode == 1


def test_standard_input(tmp_path, byte_bpe):
    texts = documents(30)
    out = tmp_path / "out"
    command(
        "tokenize", "-", "--out", out, "--tokenizer", byte_bpe, "--validation", 0, "--test", 0,
        input=jsonl(texts), text=False,
    )  # fmt: skip
    assert written(out, "train") == [encoder(byte_bpe)(text) for text in texts]
    assert read_manifest(out).sources[0]["name"] == "stdin"


def test_a_folder_of_several_kinds_of_files_is_read_and_said_so(tmp_path, byte_bpe):
    folder = tmp_path / "clone"
    for number in range(3):
        write_jsonl(folder / f"{number}.jsonl.gz", documents(20, number))
    listener = Quiet()
    tokenize(job([folder], tmp_path / "a", byte_bpe), listener)
    assert listener.said == []
    (folder / "README.md").write_text("About this corpus.")
    tokenize(job([folder], tmp_path / "b", byte_bpe), listener)
    (said,) = listener.said
    assert said.startswith(f"clone holds files of several kinds (3 jsonl, 1 text; for example {folder / 'README.md'})")


def test_a_lossy_tokenizer_is_described(tmp_path, byte_bpe, capsys):
    content = json.loads(byte_bpe.read_text())
    content["normalizer"] = {"type": "Lowercase"}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    source = write_jsonl(tmp_path / "a.jsonl", ["Some Text", "lower case"])
    manifest = run([source], tmp_path / "out", path, validation=0, test=0)
    found = manifest.statistics["round_trip"]
    assert (found["documents"], found["exact"], found["lost_bytes"], found["bytes"]) == (2, 1, 2, 19)
    assert found["example"] == {"text": "Some Text", "decoded": "some text"}
    invoke("tokenizer", "check", path, source)
    said = capsys.readouterr().out
    assert "1 of 2 come back" in said and "'Some Text' becomes 'some text'" in said
