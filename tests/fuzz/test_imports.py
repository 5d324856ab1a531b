"""Mutated token files of other stacks: a data set that verifies and holds the file's ids, or a sentence."""

from __future__ import annotations

import functools
import io
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from data_prep.interchange import imports
from data_prep.reading.manifest import read_manifest
from data_prep.reading.verify import verify_dataset
from tests.data_prep.support import EOD, make_documents, read_index_independently, write_shard_independently
from tests.fuzz.support import counts, drive, mutate_bytes

DOCUMENTS = [document for document in make_documents(30, 5) if len(document) > 1]
FLAT = np.array([token for document in DOCUMENTS for token in document], "<u2")
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    """Files of each kind that are in order, by their names."""
    folder = tmp_path_factory.mktemp("good")
    write_shard_independently(folder / "x", DOCUMENTS, 8, "<u2")
    headered = io.BytesIO()
    np.save(headered, FLAT)
    ends = np.cumsum([len(document) for document in DOCUMENTS]).astype("<u8").tobytes()
    return {
        "megatron": {"x.bin": FLAT.tobytes(), "x.idx": (folder / "x.idx").read_bytes()},
        "datatrove": {"x.bin": FLAT.tobytes(), "x.bin.index": ends},
        "nanogpt": {"x.bin": FLAT.tobytes()},
        "olmo": {"x.bin": FLAT.tobytes()},
        "olmo with numpy's header": {"x.bin": headered.getvalue()},
    }


@counts
def test_a_mutated_token_file_is_imported_as_it_is_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: dict[str, Files], count: int
) -> None:
    monkeypatch.setattr(imports, "load_tokenizer", functools.cache(imports.load_tokenizer))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    tokenizer = str(tmp_path / "tokenizer.json")
    vocabulary = {"<|endoftext|>": EOD, **{f"w{number}": number for number in range(1, 1000)}}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w1")).save(tokenizer)

    def make(source: random.Random) -> tuple[str, Files, str]:
        kind = source.choice(list(good))
        dtype = source.choice(["", "", "uint16"]) if kind in ("nanogpt", "olmo") else ""
        names = list(good[kind])
        changed = source.sample(names, source.randint(0, len(names)))
        mutated = {n: mutate_bytes(d, source) if n in changed else d for n, d in good[kind].items()}
        return kind, mutated, dtype

    def use(given: tuple[str, Files, str]) -> list[int]:
        kind, files, dtype = given
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        imports.import_files(kind.split()[0], [str(tmp_path / "x.bin")], out, tokenizer, dtype=dtype)
        assert verify_dataset(out).problems == []
        (entry,) = read_manifest(out).splits["train"].shards
        documents = read_index_independently(out / entry.name)
        assert all(document[-1] == EOD and EOD not in document[:-1] and len(document) > 1 for document in documents)
        return [token for document in documents for token in document[:-1]]

    def changed(given: tuple[str, Files, str], found: Sequence[int]) -> str | None:
        kind, files, _ = given
        raw = files["x.bin"]
        if kind.endswith("header"):
            if raw[:128] != good[kind]["x.bin"][:128]:
                return None  # another header may say another type
            raw = raw[128:]
        ids = np.frombuffer(raw[: len(raw) // 2 * 2], "<u2")
        expected = ids[ids != EOD].tolist()
        return None if list(found) == expected else f"{len(expected)} ids became {len(found)}, or others"

    drive(count, make, use, seed="imports", changed=changed, used=0.1, refused=0.1)
