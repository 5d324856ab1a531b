"""Corpora and data set folders made of given documents; index files without the package's code."""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import zstandard

from data_prep.reading.manifest import Manifest, Shard, Split, write_manifest
from data_prep.tokenizers.base import TokenizerInfo

EOD = 0
VOCABULARY = 1000

_NUMPY_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def read_index_independently(prefix: Path) -> list[list[int]]:
    """Documents of a shard, read by the format's table field by field with `struct`."""
    raw = Path(f"{prefix}.idx").read_bytes()
    data = Path(f"{prefix}.bin").read_bytes()
    assert raw[:9] == b"MMIDIDX\x00\x00"
    (version,) = struct.unpack_from("<Q", raw, 9)
    assert version == 1
    dtype = np.dtype(_NUMPY_TYPES[raw[17]])
    sequences, entries = struct.unpack_from("<QQ", raw, 18)
    lengths = struct.unpack_from(f"<{sequences}i", raw, 34)
    offsets = struct.unpack_from(f"<{sequences}q", raw, 34 + 4 * sequences)
    documents = struct.unpack_from(f"<{entries}q", raw, 34 + 12 * sequences)
    assert len(raw) == 34 + 12 * sequences + 8 * entries
    assert documents[0] == 0 and documents[-1] == sequences
    result = []
    for first, end in pairwise(documents):
        document: list[int] = []
        for number in range(first, end):
            document += np.frombuffer(data, dtype, lengths[number], offsets[number]).tolist()
        result.append(document)
    return result


def write_shard_independently(prefix: Path, documents: Sequence[Sequence[int]], code: int, numpy_type: str) -> None:
    """A shard with any type code, one sequence per document."""
    dtype = np.dtype(numpy_type)
    lengths = [len(document) for document in documents]
    offsets = [sum(lengths[:number]) * dtype.itemsize for number in range(len(lengths))]
    count = len(documents)
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, count, count + 1)
    body = struct.pack(f"<{count}i{count}q{count + 1}q", *lengths, *offsets, *range(count + 1))
    prefix.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.idx").write_bytes(header + body)
    flat = [token for document in documents for token in document]
    Path(f"{prefix}.bin").write_bytes(np.array(flat, dtype).tobytes())


def make_documents(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    """Documents of 1 to `longest` ids that end with END_OF_DOCUMENT and hold it nowhere else."""
    generator = np.random.default_rng(seed)
    return [[*generator.integers(1, VOCABULARY, generator.integers(0, longest)).tolist(), EOD] for _ in range(count)]


def write_dataset(
    folder: Path,
    shards: Mapping[str, Sequence[tuple[str, Sequence[Sequence[int]]]]],
    *,
    fingerprint: str = "f" * 64,
    vocabulary: int = VOCABULARY,
) -> Path:
    """A data set folder with, for each split, the shards given as (source, documents); its tokenizer is a stand-in."""
    splits = {}
    for split, contents in shards.items():
        entries = []
        for number, (source, documents) in enumerate(contents):
            prefix = folder / f"{split}-{number:05d}"
            write_shard_independently(prefix, documents, 8, "<u2")
            entries.append(
                Shard(
                    name=prefix.name,
                    tokens=sum(map(len, documents)),
                    documents=len(documents),
                    text_bytes=4 * sum(map(len, documents)),
                    sha256_bin=hashlib.sha256(Path(f"{prefix}.bin").read_bytes()).hexdigest(),
                    sha256_idx=hashlib.sha256(Path(f"{prefix}.idx").read_bytes()).hexdigest(),
                    source=source,
                )
            )
        splits[split] = Split(tuple(entries))
    tokenizer = TokenizerInfo("tiktoken", fingerprint, vocabulary, EOD, "tiktoken.json")
    (folder / "tiktoken.json").write_text('{"name": "made-up"}', encoding="utf-8")
    write_manifest(folder, Manifest(tokenizer=tokenizer, dtype="uint16", splits=splits))
    return folder


def write_jsonl(path: Path, records: list[object]) -> Path:
    """JSON lines, compressed as the name says."""
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zst":
        data = zstandard.compress(data)
    elif path.suffix == ".gz":
        data = gzip.compress(data)
    path.write_bytes(data)
    return path


def removed_lines(out: Path) -> list[dict[str, object]]:
    """What `dedup` or `decontaminate` say they removed."""
    raw = zstandard.ZstdDecompressor().stream_reader((out / "removed.jsonl.zst").read_bytes()).read()
    return [json.loads(line) for line in raw.splitlines()]
