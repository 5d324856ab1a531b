"""Best-fit packing: every token once, no document cut without need, close to the bound; and the sidecar."""

from __future__ import annotations

import ast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.reading.dataset import open_dataset
from data_prep.reading.inspection import show_sequence
from data_prep.reading.manifest import read_manifest
from data_prep.reading.packed import PackedDataset, is_padding, read_packing, sidecar
from data_prep.reading.shards import ShardWriter
from data_prep.tokenizing import packing as packing_module
from data_prep.tokenizing.packing import best_fit, write_packing
from tests.data_prep.support import read_index_independently
from tests.data_prep.tokenizing.test_tokenize import encoder
from tests.data_prep.writing import documents, run, write_jsonl

LENGTHS = st.lists(st.integers(0, 60), max_size=60)


def slow_best_fit(lengths, capacity):
    """Best-fit decreasing by looking at every bin; the bins as sorted tuples of piece lengths."""
    bins: list[list[int]] = []
    rest = []
    for length in lengths:
        bins += [[capacity]] * (length // capacity)
        rest.append(length % capacity)
    for size in sorted((r for r in rest if r), reverse=True):
        fitting = [b for b in bins if sum(b) + size <= capacity]
        if fitting:
            max(fitting, key=sum).append(size)
        else:
            bins.append([size])
    return sorted(tuple(sorted(b)) for b in bins)


@settings(max_examples=300, deadline=None)
@given(lengths=LENGTHS, capacity=st.integers(1, 25))
def test_it_is_a_packing_and_as_good_as_the_slow_one(lengths, capacity):
    packing = best_fit(lengths, capacity)
    starts = np.cumsum([0, *lengths])
    covered = np.zeros(starts[-1], int)
    for sequence in range(len(packing)):
        pieces = packing.of(sequence)
        assert 0 < pieces[:, 1].sum() <= capacity
        assert (np.diff(pieces[:, 0]) > 0).all()
        for first, size in pieces:
            covered[first : first + size] += 1
            document = np.searchsorted(starts, first, side="right") - 1
            assert first + size <= starts[document + 1], "a piece lies inside one document"
            if lengths[document] <= capacity:
                assert (first, size) == (starts[document], lengths[document]), "what fits is not cut"
    assert (covered == 1).all()
    firsts = [packing.of(n)[0, 0] for n in range(len(packing))]
    assert firsts == sorted(firsts)
    fullness = sorted(int(packing.of(n)[:, 1].sum()) for n in range(len(packing)))
    assert fullness == sorted(sum(b) for b in slow_best_fit(lengths, capacity))


def test_padding_of_a_usual_mix_is_small():
    lengths = np.random.default_rng(0).lognormal(5.5, 1.2, 20_000).astype(int) + 1
    packing = best_fit(lengths, 2049)
    padding = 1 - lengths.sum() / (len(packing) * 2049)
    assert padding < 0.01


def test_documents_in_blocks_are_packed_block_by_block(monkeypatch):
    monkeypatch.setattr(packing_module, "_TOGETHER", 7)
    lengths = list(np.random.default_rng(1).integers(1, 20, 50))
    packing = best_fit(lengths, 12)
    covered = sorted((int(a), int(b)) for a, b in packing.pieces)
    assert sum(size for _, size in covered) == sum(lengths)
    assert packing.sequences[-1] == len(packing.pieces) and packing.sequences[0] == 0


def test_the_sidecar_can_be_read_and_damage_is_named(tmp_path):
    with ShardWriter(tmp_path / "s", "uint16") as writer:
        for length in (3, 9, 4, 30):
            writer.write(np.arange(length), [length])
    found = write_packing(tmp_path / "s", 9)
    assert found == {"sequences": 5, "places": 50, "tokens": 46, "documents": 4, "cut_documents": 1}
    packing = read_packing(tmp_path / "s", 9)
    assert packing.capacity == 10
    assert sorted(map(tuple, packing.pieces.tolist())) == [(0, 3), (3, 9), (12, 4), (16, 10), (26, 10), (36, 10)]
    with pytest.raises(DataError, match="no packing for length 8"):
        read_packing(tmp_path / "s", 8)
    path = sidecar(tmp_path / "s", 9, "pieces")
    np.save(path, np.zeros((2, 2), np.int64))
    with pytest.raises(DataError, match="do not belong together"):
        read_packing(tmp_path / "s", 9)
    path.write_bytes(b"junk")
    with pytest.raises(DataError, match="damaged"):
        read_packing(tmp_path / "s", 9)


def test_packings_are_read_while_another_thread_parses_python(tmp_path, monkeypatch):
    """CPython's issue 106905: of two threads that parse at once, one now and then gets this error."""

    def parse(*arguments, **more):
        raise SystemError("AST constructor recursion depth mismatch (before=42, after=39)")

    with ShardWriter(tmp_path / "s", np.uint16) as writer:
        writer.write(np.arange(9), [3, 6])
    write_packing(tmp_path / "s", 9)
    with monkeypatch.context() as patched:
        patched.setattr(ast, "parse", parse)
        assert len(read_packing(tmp_path / "s", 9)) == 1


def test_tokenize_packs_and_reports(tmp_path, byte_bpe):
    source = write_jsonl(tmp_path / "a.jsonl", documents(300))
    for workers in (1, 2):
        manifest = run(
            [source], tmp_path / str(workers), byte_bpe, workers=workers, packing="best-fit", sequence_length=64,
            piece_bytes=9000,
        )  # fmt: skip
    report = read_manifest(tmp_path / "1").statistics["packing"]
    assert report == manifest.statistics["packing"]
    train = manifest.splits["train"]
    assert report["length"] == 64
    assert report["train"]["tokens"] == train.tokens and report["train"]["documents"] == train.documents
    lengths, tokens_of = [], []
    for shard in train.shards:
        tokens_of += map(len, read_index_independently(tmp_path / "2" / shard.name))
        packing = read_packing(tmp_path / "2" / shard.name, 64)
        lengths.append(len(packing))
        assert packing.pieces[:, 1].sum() == shard.tokens
    assert report["train"]["sequences"] == sum(lengths)
    assert report["train"]["padding"] == pytest.approx(1 - train.tokens / (sum(lengths) * 65), abs=1e-6)
    assert 65 in tokens_of, "a document that just fits must be among them"
    assert report["train"]["cut_documents"] == sum(tokens > 65 for tokens in tokens_of)
    assert report["train"]["truncation"] == pytest.approx(report["train"]["cut_documents"] / len(tokens_of), abs=1e-6)


def test_concat_reports_the_documents_it_cuts(tmp_path, byte_bpe):
    source = write_jsonl(tmp_path / "a.jsonl", documents(300))
    more = {"sequence_length": 64, "piece_bytes": 9000, "validation": 0, "test": 0}
    run([source], tmp_path / "out", byte_bpe, packing="concat", **more)
    manifest = read_manifest(tmp_path / "out")
    sequence_of: list[list[int]] = []  # for every document, the sequences its tokens are in
    place = 0
    for shard in manifest.splits["train"].shards:
        for document in read_index_independently(tmp_path / "out" / shard.name):
            sequence_of.append([(place + n) // 64 for n in range(len(document))])
            place += len(document)
    report = manifest.statistics["packing"]["train"]
    assert report["tokens"] == place and report["documents"] == 300 and report["padding"] == 0
    assert report["sequences"] == open_dataset(tmp_path / "out").num_sequences(64)
    assert report["cut_documents"] == sum(len(set(numbers)) > 1 for numbers in sequence_of)
    assert 0 < report["truncation"] < 1


def test_a_packed_sequence_is_shown_as_training_reads_it(tmp_path, byte_bpe):
    texts = documents(60, lines=2)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    more = {"sequence_length": 200, "validation": 0, "test": 0}
    run([source], tmp_path / "out", byte_bpe, packing="best-fit", **more)
    data = PackedDataset(open_dataset(tmp_path / "out"), 200)
    whole = 0
    for number in range(data.num_sequences(200)):
        head, *shown = show_sequence(tmp_path / "out", "train", number, 0).split("\n--- ")
        parts = [text.partition("\n")[2] for text in shown]
        padding = int(is_padding(data.sequence(number, 200), data.eod_id).sum())
        assert f"200 tokens and the next one, packed best-fit with {padding} of padding, {len(parts)} doc" in head
        whole += sum(part in texts for part in parts)
    assert whole == sum(len(encoder(byte_bpe)(text)) <= 201 for text in texts)
    assert "packed" not in show_sequence(tmp_path / "out", "train", 0, 100)
