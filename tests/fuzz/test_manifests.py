"""Mutated manifests, plans and receipts of data sets: read as they stand, or refused in a sentence."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest

from data_prep.reading.dataset import open_dataset
from data_prep.reading.length_statistics import report
from data_prep.reading.manifest import Manifest, read_manifest
from data_prep.reading.packed import PackedDataset
from data_prep.reading.verify import verify_dataset
from data_prep.tokenizing.merge import build_manifest, merged_schedule
from data_prep.tokenizing.piece_schedule import Share
from data_prep.tokenizing.pipeline import tokenize
from data_prep.tokenizing.shard_plan import WORK, read_plan
from tests.data_prep.writing import Quiet, documents, job, small_byte_bpe, write_jsonl
from tests.fuzz.support import counts, drive, lost, mutate_json, packed_dataset

LENGTH = 16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards, packed, with all that a manifest says of a data set made from text."""
    folder = packed_dataset(tmp_path / "data", LENGTH)
    path = folder / "manifest.json"
    value = json.loads(path.read_text())
    value["sources"] = [{"name": "web", "documents": 29, "tokens": 500, "text_bytes": 2000}]
    value["engine"] = {"name": "fastokens", "versions": {"tokenizers": "0.22"}, "fallbacks": 1}
    value["rejects"] = {"too_long": 2}
    value["statistics"] = {
        "filtered": {"length": 3},
        "lengths_log2": {"web": [0, 1, 5], "law": [2]},
        "round_trip": {"documents": 5, "exact": 4, "words": 9, "tokens": 20, "example": {"text": "a", "decoded": "b"}},
        "packing": {"length": LENGTH, "train": {"sequences": 5, "padding": 0.1, "truncation": 0.0}},
    }
    path.write_text(json.dumps(value))
    return folder


@counts
def test_manifests(folder: Path, count: int) -> None:
    file = folder / "manifest.json"
    value = json.loads(file.read_text())

    def use(given: bytes) -> Manifest:
        file.write_bytes(given)
        manifest = read_manifest(folder)
        manifest.digest()
        report(manifest)
        if given[-2] % 4 == 0:  # takes longer than all else
            verify_dataset(folder)
        for split in manifest.splits:
            data = open_dataset(folder, split)
            assert data.tokenizer_path.resolve().is_relative_to(folder.resolve())
            for index in range(min(5, data.num_sequences(LENGTH))):
                data.sequence(index, LENGTH)
            if data.num_tokens and manifest.settings.get("packing") == "best-fit":
                PackedDataset(data, LENGTH).sequence(0, LENGTH)
        return manifest

    def changed(given: bytes, manifest: Manifest) -> str | None:
        return lost(asdict(manifest), json.loads(given))  # keys that are not read may say anything

    drive(count, lambda source: mutate_json(value, source), use, changed=changed, used=0.05, refused=0.33)


@counts
def test_what_an_unfinished_run_leaves(tmp_path: Path, count: int) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", documents(60))
    folder = tmp_path / "out"
    todo = job([source], folder, small_byte_bpe(tmp_path / "t.json"), validation=0.1, test=0.1)
    tokenize(todo, Quiet(), share=Share(0, 1))
    files = [folder / WORK / "plan.json", *sorted((folder / WORK).glob("piece-*.json"))]
    originals = {file: file.read_bytes() for file in files}
    assert len(files) == 2

    def mutated(source: random.Random) -> tuple[Path, bytes]:
        file = source.choice(files)
        return file, mutate_json(json.loads(originals[file]), source)

    def use(given: tuple[Path, bytes]) -> Manifest | None:
        for file, content in originals.items():
            file.write_bytes(content)
        given[0].write_bytes(given[1])
        plan = read_plan(folder)
        assert plan is not None
        schedule = merged_schedule(folder, plan)
        return build_manifest(plan, schedule.in_order()) if schedule.complete else None

    drive(count // 2, mutated, use, used=0.01, refused=0.33)
