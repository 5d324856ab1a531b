"""Mutated indexes, ids and packings are refused in a sentence or read on, and `verify` misses none that matters.

They are read in another process, so that a crash (a mapped file read beyond its end, say) shows as one.
"""

from __future__ import annotations

import json
import subprocess
import sys
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
PACKING = f"train-00000.packing-{LENGTH}"
FILES = ("train-00000.idx", "train-00001.bin", f"{PACKING}.pieces.npy", f"{PACKING}.sequences.npy")


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


def fuzz(folder: Path, name: str, count: int) -> Counter[str]:
    """Read `folder` with `count` mutations of one of its files; how often each way of reading it refused."""
    file = folder / name
    original = file.read_bytes()
    refused = Counter[str]()
    ways: tuple[Callable[[Path], None], ...] = (read_sequences, read_documents, read_packed, verify)

    def use(given: bytes) -> None:
        file.unlink()  # what still maps the file before keeps it
        file.write_bytes(given)
        for way in ways:
            try:
                way(folder)
            except DataError as error:
                assert "\n" not in str(error) and str(folder) in str(error), error
                refused[way.__name__] += 1

    def changed(given: bytes, _: object) -> None:
        refused["changed"] += given != original

    drive(count, lambda source: mutate_bytes(original, source), use, seed=name, changed=changed)
    return refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return packed_dataset(tmp_path / "data", LENGTH)


@counts
def test_mutated_files(folder: Path, count: int) -> None:
    share = count // len(FILES)
    command = f"import tests.fuzz.test_indices as t, sys; t.main(sys.argv[1], {share})"
    run = subprocess.run([sys.executable, "-c", command, str(folder)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    for name in FILES[:2]:  # these have checksums
        assert found[name]["verify"] == found[name]["changed"] > share * 0.9
        assert found[name]["read_sequences"] > share // 3
    for name in FILES[2:]:
        assert "read_sequences" not in found[name] and found[name]["read_packed"] > share // 3


def main(folder: str, count: int) -> None:
    """What the other process does."""
    found = {}
    for name in FILES:
        original = (Path(folder) / name).read_bytes()
        found[name] = fuzz(Path(folder), name, count)
        (Path(folder) / name).write_bytes(original)
    print(json.dumps(found))


def test_what_is_not_mutated_is_read(folder: Path) -> None:
    for way in (read_sequences, read_documents, read_packed, verify):
        way(folder)
