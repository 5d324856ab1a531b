"""Packed sequences: every document once, whole where it fits, with padding that can be told from text."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import DataError
from data_prep.reading.dataset import open_dataset
from data_prep.reading.mixture import Mixture, MixtureSource, Phase
from data_prep.reading.packed import PackedDataset, is_padding, sidecar
from data_prep.tokenizing.packing import write_packing
from tests.data_prep.support import EOD, make_documents, write_dataset

LENGTH = 15
SHARDS = [("web", make_documents(40, 1, longest=12)), ("books", make_documents(9, 2, longest=60)), ("web", [[3, EOD]])]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_dataset(tmp_path / "data", {"train": [(s, [d for d in docs if len(d) > 1]) for s, docs in SHARDS]})
    for number in range(3):
        write_packing(folder / f"train-{number:05d}", LENGTH)
    return folder


def test_every_document_is_in_the_sequences_once(folder: Path) -> None:
    data = PackedDataset(open_dataset(folder), LENGTH)
    documents = [d for _, docs in SHARDS for d in docs if len(d) > 1]
    found: list[list[int]] = []
    full = 0
    for index in range(data.num_sequences(LENGTH)):
        window = data.sequence(index, LENGTH)
        assert window.shape == (LENGTH + 1,) and window.dtype == np.uint16
        text = window[~is_padding(window, EOD)].tolist()
        assert is_padding(window, EOD).tolist() == [False] * len(text) + [True] * (LENGTH + 1 - len(text))
        full += len(text)
        piece: list[int] = []
        for token in text:
            piece.append(token)
            if token == EOD:
                found.append(piece)
                piece = []
        found += [piece] if piece else []
    assert full == sum(map(len, documents)) == data.num_tokens
    fitting = [d for d in documents if len(d) <= LENGTH + 1]
    pieces = [d[at : at + LENGTH + 1] for d in documents if len(d) > LENGTH + 1 for at in range(0, len(d), LENGTH + 1)]
    assert sorted(found) == sorted(fitting + pieces)


def test_packed_data_is_shuffled_mixed_and_pickled_like_any_other(folder: Path) -> None:
    data = PackedDataset(open_dataset(folder), LENGTH)
    copy: PackedDataset = pickle.loads(pickle.dumps(data))
    everything = data.batch(range(data.num_sequences(LENGTH)), LENGTH)
    assert np.array_equal(copy.batch(range(len(everything)), LENGTH), everything)
    sources = [MixtureSource(name, data.only(name)) for name in ("web", "books")]
    mixture = Mixture(sources, LENGTH, [Phase(0, {"web": 1, "books": 1})], seed=1)
    chosen, indexes = mixture.draw(0, 8)
    for row, source, index in zip(mixture.batch(0, 8), chosen, indexes):
        assert np.array_equal(row, sources[source].dataset.sequence(int(index), LENGTH))
    assert sum(source.dataset.num_sequences(LENGTH) for source in sources) == len(everything)
    assert data.batch([], LENGTH).shape == (0, LENGTH + 1)
    assert (data.eod_id, data.sources) == (EOD, ["web", "books"])


def test_another_length_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="has no packing for length 99"):
        PackedDataset(open_dataset(folder), 99)
    with pytest.raises(DataError, match="packed for sequences of 15, not 16"):
        PackedDataset(open_dataset(folder), LENGTH).sequence(0, 16)
    with pytest.raises(IndexError):
        PackedDataset(open_dataset(folder), LENGTH).sequence(10_000, LENGTH)


def test_a_packing_that_points_outside_is_refused(folder: Path) -> None:
    path = sidecar(folder / "train-00000", LENGTH, "pieces")
    pieces = np.load(path)
    pieces[0] = (10**9, 5)
    np.save(path, pieces)
    with pytest.raises(DataError, match="sequence 0 takes 5 tokens from 1000000000"):
        PackedDataset(open_dataset(folder), LENGTH).sequence(0, LENGTH)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match="is damaged"):
        PackedDataset(open_dataset(folder), LENGTH)
