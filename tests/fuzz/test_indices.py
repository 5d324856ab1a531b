"""Mutated indexes, ids and packings are refused in a sentence or read on, and `verify` misses none that matters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.errors import DataError
from data_prep.interchange.exports import copy_documents
from data_prep.reading.dataset import open_dataset
from data_prep.reading.packed import PackedDataset
from data_prep.reading.verify import verify_dataset
from tests.fuzz.support import counts, drive, mutate_bytes, packed_dataset

LENGTH = 16
INDEXED = ["train-00000.idx", "train-00001.bin"]
PACKINGS = [f"train-00000.packing-{LENGTH}.{part}.npy" for part in ("pieces", "sequences")]


class Sink:
    """Takes documents and keeps none."""

    def write(self, ids: object, lengths: object) -> None: ...

    def extend(self, ids: object) -> None: ...

    def end_document(self) -> None: ...


def read_sequences(folder: Path) -> None:
    data = open_dataset(folder)
    for index in range(data.num_sequences(LENGTH)):
        data.sequence(index, LENGTH)


def read_documents(folder: Path) -> None:
    for shard in open_dataset(folder).shards:
        for number in range(min(shard.num_documents, 100)):
            shard.document(number)
        copy_documents(shard, Sink())  # type: ignore[arg-type]


def read_packed(folder: Path) -> None:
    data = PackedDataset(open_dataset(folder), LENGTH)
    for index in range(min(data.num_sequences(LENGTH), 100)):
        data.sequence(index, LENGTH)


def verify(folder: Path) -> None:
    problems = verify_dataset(folder).problems
    if problems:
        raise DataError(problems[0])


WAYS: tuple[Callable[[Path], None], ...] = (read_sequences, read_documents, read_packed, verify)


@counts
@pytest.mark.parametrize("name", [*INDEXED, *PACKINGS])
def test_mutated_files(tmp_path: Path, name: str, count: int) -> None:
    folder = packed_dataset(tmp_path / "data", LENGTH)
    for way in WAYS:
        way(folder)
    file = folder / name
    original = file.read_bytes()
    refused = Counter[str]()

    def use(given: bytes) -> None:
        file.unlink()  # what still maps the file before keeps it
        file.write_bytes(given)
        refused["changed"] += given != original
        for way in WAYS:
            try:
                way(folder)
            except DataError as error:
                assert "\n" not in str(error) and str(folder) in str(error), error
                refused[way.__name__] += 1

    share = count // 4
    drive(share, lambda source: mutate_bytes(original, source), use, seed=name)
    if name in INDEXED:  # these have checksums
        assert refused["verify"] == refused["changed"] > share * 0.9
        assert refused["read_sequences"] > share // 3
    else:
        assert not refused["read_sequences"] and refused["read_packed"] > share // 3
