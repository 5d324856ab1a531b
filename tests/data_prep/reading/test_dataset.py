"""Reading a data set folder: windows against plain lists, and one clear sentence for each thing that can be wrong."""

from __future__ import annotations

import json
import os
import pickle
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.reading import dataset as module
from data_prep.reading.dataset import document_ids, open_dataset
from data_prep.reading.manifest import Split, read_manifest
from data_prep.reading.shards import Shard
from tests.data_prep.support import EOD, VOCABULARY, make_documents, write_dataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_dataset(
        tmp_path / "data",
        {
            "train": [
                ("web", make_documents(20, 1)),
                ("books", make_documents(3, 2, longest=200)),
                ("web", [[5, EOD]]),
            ],
            "validation": [("web", make_documents(4, 3))],
        },
    )


def stream(*shards: list[list[int]]) -> list[int]:
    return [token for documents in shards for document in documents for token in document]


def test_the_digest_is_of_what_is_read(folder: Path) -> None:
    manifest = read_manifest(folder)
    later = replace(manifest, created="later", version="9", engine={"name": "another"})
    assert later.digest() == manifest.digest()
    train = manifest.splits["train"]
    for changed in (
        replace(manifest, splits={**manifest.splits, "train": replace(train, shards=train.shards[::-1])}),
        replace(manifest, splits={"train": Split((replace(train.shards[0], sha256_bin="0"), *train.shards[1:]))}),
        replace(manifest, tokenizer=replace(manifest.tokenizer, eod_id=5)),
        replace(manifest, settings={"validation": 0.5}),
    ):
        assert changed.digest() != manifest.digest()


def test_what_a_data_set_knows_about_itself(folder: Path) -> None:
    data = open_dataset(folder)
    tokens = stream(make_documents(20, 1), make_documents(3, 2, longest=200), [[5, EOD]])
    assert (data.num_tokens, data.num_documents) == (len(tokens), 24)
    assert (data.vocab_size, data.eod_id, data.tokenizer_fingerprint) == (VOCABULARY, EOD, "f" * 64)
    assert data.sources == ["web", "books"]
    assert data.text_bytes == 4 * len(tokens)
    assert data.manifest_digest == open_dataset(folder, "validation").manifest_digest
    assert open_dataset(folder, "validation").num_documents == 4
    window = data.sequence(0, 8)
    assert not window.flags.owndata and not window.flags.writeable and window.dtype == np.uint16


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    length=st.integers(1, 9),
)
def test_every_window_is_a_slice_of_the_stream(
    sizes: list[int], length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shards = [make_documents(size, number, longest=5) for number, size in enumerate(sizes)]
    folder = write_dataset(tmp_path_factory.mktemp("d"), {"train": [("s", documents) for documents in shards]})
    data = open_dataset(folder, verify="checksums")
    tokens = stream(*shards)
    count = data.num_sequences(length)
    assert count * length + 1 <= max(len(tokens), 1) and (count + 1) * length + 1 > len(tokens)
    for index in range(count):
        assert data.sequence(index, length).tolist() == tokens[index * length : index * length + length + 1]
    if count:
        assert data.batch(range(count), length).tolist() == [data.sequence(i, length).tolist() for i in range(count)]
    for index in (-1, count):
        with pytest.raises(IndexError):
            data.sequence(index, length)


def test_one_source_alone(folder: Path) -> None:
    web = open_dataset(folder).only("web")
    tokens = stream(make_documents(20, 1), [[5, EOD]])
    assert (web.num_tokens, web.num_documents, web.sources) == (len(tokens), 21, ["web"])
    assert web.sequence(web.num_sequences(7) - 1, 7).tolist() == tokens[web.num_sequences(7) * 7 - 7 :][:8]
    with pytest.raises(DataError, match="no source 'law' in train; it has web, books"):
        open_dataset(folder).only("law")


def test_documents_inside_a_window() -> None:
    tokens = [[4, 4, EOD, 5, EOD, EOD, 6, 6], [EOD, 1, 1, 1, 1, 1, 1, EOD]]
    expected = [[0, 0, 0, 1, 1, 2, 3, 3], [0, 1, 1, 1, 1, 1, 1, 1]]
    assert document_ids(tokens, EOD).tolist() == expected
    assert document_ids(tokens[0], EOD).tolist() == expected[0]
    assert document_ids(np.zeros((2, 0)), EOD).shape == (2, 0)


def test_more_shards_than_mappings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAPPINGS", 2)
    shards = [make_documents(3, number) for number in range(7)]
    data = open_dataset(write_dataset(tmp_path, {"train": [("s", documents) for documents in shards]}))
    first = data.sequence(0, 3)
    held = first.tolist()
    tokens = stream(*shards)
    for _ in range(2):
        for index in range(data.num_sequences(3)):
            assert data.sequence(index, 3).tolist() == tokens[3 * index : 3 * index + 4]
    assert data._mapped.cache_info().currsize == 2
    assert first.tolist() == held


def test_reading_from_threads_and_from_a_pickled_copy(folder: Path) -> None:
    data = open_dataset(folder)
    copy = pickle.loads(pickle.dumps(data))
    expected = data.batch(range(data.num_sequences(5)), 5)
    results: list[np.ndarray] = []
    threads = [
        threading.Thread(target=lambda: results.append(copy.batch(range(copy.num_sequences(5)), 5))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(np.array_equal(result, expected) for result in results)


def edit_manifest(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    path = folder / "manifest.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_shard(folder: Path, **changes: object) -> None:
    edit_manifest(folder, lambda value: value["splits"]["train"]["shards"][1].update(changes))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: (f / "manifest.json").unlink(), "is not a finished data set: it has no manifest.json"),
        (lambda f: (f / "manifest.json").write_text('{"format_'), "cannot be read as JSON"),
        (lambda f: (f / "manifest.json").write_text("[]"), "format_version 1 was expected"),
        (lambda f: (f / "train-00001.bin").unlink(), r"train-00001\.bin is missing; copy it"),
        (lambda f: (f / "train-00001.idx").unlink(), r"train-00001\.idx is missing; copy it"),
        (lambda f: (f / "train-00001.bin").write_bytes(b"12"), r"train-00001\.bin has 2 bytes, but its index expects"),
        (lambda f: edit_shard(f, tokens=1), "has tokens .* where the manifest says 1"),
        (lambda f: edit_shard(f, documents=2), "has documents 3 where the manifest says 2"),
        (lambda f: edit_manifest(f, lambda v: v.update(dtype="int32")), "has ids of type uint16 .* says int32"),
        (lambda f: edit_manifest(f, lambda v: v["tokenizer"].update(eod_id=4000)), "END_OF_DOCUMENT 4000 does not fit"),
        (lambda f: edit_shard(f, name="../x"), "plain file name"),
        (lambda f: edit_manifest(f, lambda v: v.update(statistics={"filtered": []})), r"statistics\.filtered: "),
        (lambda f: edit_manifest(f, lambda v: v["splits"].pop("train")), "has no split 'train'; it has validation"),
    ],
)
def test_whatever_is_wrong_is_said_in_one_sentence(folder: Path, damage, sentence: str) -> None:  # type: ignore[no-untyped-def]
    damage(folder)
    with pytest.raises(DataError, match=sentence) as caught:
        open_dataset(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_another_tokenizer_is_refused(folder: Path) -> None:
    open_dataset(folder, fingerprint="f" * 64)
    with pytest.raises(DataError, match=r"written with another tokenizer .* than this run's"):
        open_dataset(folder, fingerprint="0" * 64)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_checksums_find_one_changed_byte(folder: Path, suffix: str) -> None:
    path = folder / f"train-00000.{suffix}"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    open_dataset(folder)
    with pytest.raises(DataError, match=rf"train-00000\.{suffix} has changed since it was written"):
        open_dataset(folder, verify="checksums")


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_file_that_is_cut_off_or_removed_after_opening_is_no_shorter_data_set(folder: Path, suffix: str) -> None:
    def touch(shard: Shard) -> None:
        shard.map_tokens() if suffix == "bin" else shard.document(0)

    path = folder / f"train-00000.{suffix}"
    data = open_dataset(folder)
    shard = Shard(path)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(DataError, match=rf"train-00000\.{suffix} has \d+ bytes, but had \d+"):
        touch(shard)
    if suffix == "bin":
        with pytest.raises(DataError, match=r"but had \d+ when the data set was opened"):
            data.window(0, data.num_tokens)
    path.unlink()
    with pytest.raises(DataError, match=rf"train-00000\.{suffix} cannot be read any more: No such file"):
        touch(shard)
