"""The document shuffle: a permutation, decided by the seed alone, well mixed, each source for itself."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from data_prep.reading.manifest import Shard, read_manifest
from data_prep.reading.shards import ShardWriter
from data_prep.reading.verify import verify_dataset
from data_prep.tokenizing import shuffle
from data_prep.tokenizing.shuffle import document_hashes
from tests.data_prep.tokenizing.test_tokenize import written
from tests.data_prep.writing import digest, documents, run, write_jsonl


@pytest.fixture(scope="module")
def plain_and_shuffled(tmp_path_factory, byte_bpe):
    folder = tmp_path_factory.mktemp("shuffle")
    sources = [write_jsonl(folder / "a.jsonl", documents(500)), write_jsonl(folder / "b.jsonl", documents(300, 9))]
    smallest, block = shuffle._SMALLEST, shuffle._BLOCK
    shuffle._SMALLEST, shuffle._BLOCK = 20_000, 700  # several new shards, and documents larger than a block
    try:
        run(sources, folder / "plain", byte_bpe, piece_bytes=9000)
        for name, workers, seed in (("one", 1, 5), ("two", 2, 5), ("other", 1, 6)):
            run(sources, folder / name, byte_bpe, workers=workers, piece_bytes=9000, shuffle_seed=seed)
    finally:
        shuffle._SMALLEST, shuffle._BLOCK = smallest, block
    return folder


@pytest.mark.parametrize("source", ["a", "b"])
def test_it_is_a_permutation_of_each_source(plain_and_shuffled, source):
    before, after = (written(plain_and_shuffled / name, "train", source) for name in ("plain", "one"))
    assert before != after and sorted(before) == sorted(after)
    assert written(plain_and_shuffled / "plain", "test") == written(plain_and_shuffled / "one", "test")


def test_only_the_seed_decides(plain_and_shuffled):
    assert digest(plain_and_shuffled / "one") == digest(plain_and_shuffled / "two")
    assert written(plain_and_shuffled / "one", "train") != written(plain_and_shuffled / "other", "train")


def test_the_folder_is_in_order_and_holds_nothing_else(plain_and_shuffled):
    folder = plain_and_shuffled / "one"
    manifest, plain = read_manifest(folder), read_manifest(plain_and_shuffled / "plain")
    assert verify_dataset(folder).problems == []
    assert manifest.splits["train"].text_bytes == plain.splits["train"].text_bytes
    assert len(manifest.splits["train"].shards) > 4
    named = {shard.name for split in manifest.splits.values() for shard in split.shards}
    assert {path.stem for path in folder.glob("*.bin")} == named


def test_places_are_independent_of_where_documents_came_from(plain_and_shuffled):
    before = {tuple(d): n for n, d in enumerate(written(plain_and_shuffled / "plain", "train", "a"))}
    places = np.array([before[tuple(d)] for d in written(plain_and_shuffled / "one", "train", "a")])
    correlation = np.corrcoef(places, np.arange(places.size))[0, 1]
    assert abs(correlation) < 4 / np.sqrt(places.size)
    neighbours = np.mean(np.abs(np.diff(places)) == 1)
    assert neighbours < 0.03


def test_hashes_are_splitmix64():
    # First outputs of the reference generator with seed 0 (Steele, Lea and Flood 2014).
    assert shuffle._mixed(np.zeros(1, np.uint64))[0] == 0
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert document_hashes(0, 0, 3).tolist() == expected
    assert document_hashes(0, 1, 2).tolist() == expected[1:]


def test_memory_does_not_grow_with_the_number_of_documents(tmp_path, monkeypatch):
    """Ten times as many documents, in ten times as many shards, take the room of one shard's."""
    monkeypatch.setattr(shuffle, "_SMALLEST", 4_000)
    monkeypatch.setattr(shuffle, "_BLOCK", 500)
    peaks = []
    for shards in (2, 20):
        folder = tmp_path / str(shards)
        entries = []
        for number in range(shards):
            with ShardWriter(folder / f"train-{number:05d}", np.uint16) as writer:
                writer.write(np.arange(4_000), np.full(2_000, 2))
            done = writer.summary
            entries.append(Shard(done.name, done.tokens, done.documents, 0, done.sha256_bin, done.sha256_idx, "s"))
        tracemalloc.start()
        made = shuffle.shuffle_source(folder, tmp_path, entries, 1, 0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert sum(entry.documents for entry in made) == 2_000 * shards
    assert peaks[1] < 1.5 * peaks[0]
