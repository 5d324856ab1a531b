"""Mutated indexes, packings and manifests end in a DataError or read on; never in another exception, a crash or a hang.

Everything is read in one other process, so that a crash (a mapped file read beyond its end, say) would show as one.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_prep.manifest import read_manifest
from data_prep.packing import write_packing
from tests.data_prep.support import make_documents, write_dataset

LENGTH = 16
MUTATIONS = 100

READ_ALL = """
import json, sys
from data_prep.dataset import open_dataset, open_shard
from data_prep.errors import DataError
from data_prep.exports import copy_documents, export_megatron
from data_prep.verify import verify_dataset

class Sink:
    def write(self, ids, lengths): pass
    def extend(self, ids): pass
    def end_document(self): pass

def attempt(action):
    try:
        action()
        return "fine"
    except DataError as error:
        assert "\\n" not in str(error), error
        return "refused"

def read_everything(folder):
    data = open_dataset(folder)
    for index in range(data.num_sequences(16)):
        data.sequence(index, 16)

def read_documents(folder):
    data = open_dataset(folder)
    for shard in data._shards:
        for number in range(min(shard.num_documents, 100)):
            shard.document(number)
        copy_documents(shard, Sink())

def read_packed(folder):
    data = open_dataset(folder).packed(16)
    for index in range(min(data.num_sequences(16), 100)):
        data.sequence(index, 16)

counts = {}
for line in sys.stdin:
    folder = line.strip()
    for action in (read_everything, read_documents, read_packed, verify_dataset):
        key = action.__name__ + " " + attempt(lambda: action(folder))
        counts[key] = counts.get(key, 0) + 1
print(json.dumps(counts))
"""


def read_all(folders: list[Path]) -> dict[str, int]:
    run = subprocess.run(
        [sys.executable, "-c", READ_ALL],
        input="\n".join(map(str, folders)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    counts: dict[str, int] = json.loads(run.stdout.splitlines()[-1])
    return counts


@pytest.fixture
def original(tmp_path: Path) -> Path:
    documents = [document for document in make_documents(30, 1) if len(document) > 1]
    folder = write_dataset(tmp_path / "original", {"train": [("web", documents), ("law", documents[:7])]})
    for entry in read_manifest(folder).splits["train"].shards:
        write_packing(folder / entry.name, LENGTH)
    path = folder / "manifest.json"
    value = json.loads(path.read_text())
    value["settings"] = {"packing": "best-fit", "sequence_length": LENGTH}
    path.write_text(json.dumps(value))
    return folder


def mutate_bytes(data: bytes, source: random.Random) -> bytes:
    """`data` with a few bytes changed, cut off, inserted, or a number replaced by an extreme one."""
    raw = bytearray(data)
    for _ in range(source.choice([1, 1, 2, 5])):
        place = source.randrange(len(raw)) if raw else 0
        match source.randrange(5):
            case 0:
                raw[place : place + 1] = bytes([source.randrange(256)])
            case 1:
                del raw[place:]
            case 2:
                raw[place:place] = source.randbytes(source.choice([1, 4, 8, 100]))
            case 3:
                extreme = source.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1])
                raw[place : place + 8] = extreme.to_bytes(8, "little")[: len(raw) - place]
            case 4:
                del raw[place : place + source.choice([1, 2, 8])]
    return bytes(raw)


def mutate_json(value: Any, source: random.Random) -> Any:
    """`value` with one part, at any depth, removed or replaced by something else."""
    others: list[Any] = [None, True, -1, 0, 2**70, 1.5, float("nan"), "", "x", "../x", "\x00", [], {}, [[]], {"x": 1}]
    if isinstance(value, (dict, list)) and value and source.random() < 0.85:
        key = source.choice(list(value)) if isinstance(value, dict) else source.randrange(len(value))
        copy: Any = value.copy()
        if source.random() < 0.1:
            del copy[key]
        else:
            copy[key] = mutate_json(value[key], source)
        return copy
    return source.choice(others)


@pytest.mark.parametrize("name", ["train-00000.idx", "train-00001.bin", "pieces", "sequences", "manifest.json"])
def test_mutated_bytes(original: Path, tmp_path: Path, name: str) -> None:
    if name in ("pieces", "sequences"):
        name = f"train-00000.packing-{LENGTH}.{name}.npy"
    source = random.Random(name)
    folders = []
    for number in range(MUTATIONS):
        folder = shutil.copytree(original, tmp_path / f"m{number}")
        (folder / name).write_bytes(mutate_bytes((original / name).read_bytes(), source))
        folders.append(folder)
    counts = read_all(folders)
    assert sum(counts.values()) == 4 * MUTATIONS
    if "packing" in name:
        assert counts["read_everything fine"] == MUTATIONS and counts["read_packed refused"] > MUTATIONS // 3
    else:
        assert counts["read_everything refused"] > MUTATIONS // 3


def test_mutated_values_of_the_manifest(original: Path, tmp_path: Path) -> None:
    source = random.Random(7)
    value = json.loads((original / "manifest.json").read_text())
    folders = []
    for number in range(2 * MUTATIONS):
        folder = shutil.copytree(original, tmp_path / f"m{number}")
        (folder / "manifest.json").write_text(json.dumps(mutate_json(value, source)))
        folders.append(folder)
    counts = read_all(folders)
    assert counts["read_everything refused"] > MUTATIONS // 2 and counts["read_everything fine"] > 0
