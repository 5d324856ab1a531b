"""Shards: the writer against an independent reader of the format, the reader against an independent writer."""

from __future__ import annotations

import errno
import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.reading import shards
from data_prep.reading.shards import Shard, ShardWriter
from tests.data_prep.support import make_documents, read_index_independently, write_shard_independently

DOCUMENTS = st.lists(st.lists(st.integers(0, 65_535), max_size=30), max_size=20)


@pytest.mark.parametrize("dtype", ["<u1", "<i1", "<i2", "<i4", "<i8", "<u2"])
def test_written_shard_is_what_the_format_says(tmp_path: Path, dtype: str) -> None:
    documents = [[1, 2, 3], [], [127], [5, 6]]
    with ShardWriter(tmp_path / "deep" / "train-00000.v2", dtype) as writer:
        writer.write(np.array([1, 2, 3], np.uint32), [3, 0])
        writer.write([127], [1])
        writer.extend([5])
        writer.extend([6])
        writer.end_document()
    prefix = tmp_path / "deep" / "train-00000.v2"
    assert read_index_independently(prefix) == documents
    shard = Shard(f"{prefix}.idx")
    assert shard.dtype == np.dtype(dtype) and shard.tokens.tolist() == [1, 2, 3, 127, 5, 6]
    assert [shard.document(number).tolist() for number in range(4)] == documents
    assert (writer.summary.tokens, writer.summary.documents, writer.summary.name) == (6, 4, "train-00000.v2")
    for suffix, digest in (("bin", writer.summary.sha256_bin), ("idx", writer.summary.sha256_idx)):
        assert hashlib.sha256(Path(f"{prefix}.{suffix}").read_bytes()).hexdigest() == digest
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["train-00000.v2.bin", "train-00000.v2.idx"]


@settings(max_examples=60, deadline=None)
@given(documents=DOCUMENTS)
def test_any_documents_are_read_back(documents: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> None:
    prefix = tmp_path_factory.mktemp("shard") / "s"
    with ShardWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.write(np.array(document, np.int64), [len(document)])
    assert read_index_independently(prefix) == documents
    shard = Shard(prefix)
    assert [shard.document(number).tolist() for number in range(shard.num_documents)] == documents


def test_nothing_appears_when_writing_fails(tmp_path: Path) -> None:
    old = make_documents(3)
    with ShardWriter(tmp_path / "s", np.uint16) as writer:
        for document in old:
            writer.write(document, [len(document)])
    with pytest.raises(RuntimeError, match="interrupted"), ShardWriter(tmp_path / "s", np.uint16) as writer:
        writer.write([1, 2, 3], [3])
        raise RuntimeError("interrupted")
    assert read_index_independently(tmp_path / "s") == old
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_system_without_modes_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as exFAT on a portable disk, where chmod is refused."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    with ShardWriter(tmp_path / "a", "<u2") as writer:
        writer.write([1, 2], [2])
    assert read_index_independently(tmp_path / "a") == [[1, 2]]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    class FullDisk:
        def write(self, _data: bytes) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"), ShardWriter(tmp_path / "s", np.uint16) as writer:
        writer._bin = FullDisk()  # type: ignore[assignment]
        writer.write([1], [1])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        ([70_000], "70000 to 70000 do not fit uint16"),
        ([-1], "do not fit uint16"),
        ([0.5], "integer ids"),
        ([[1, 2]], "flat array"),
    ],
)
def test_wrong_ids_are_refused(tmp_path: Path, ids: list[object], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence), ShardWriter(tmp_path / "s", np.uint16) as writer:
        writer.extend(ids)


def test_wrong_calls_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="cannot hold ids of type float32"):
        ShardWriter(tmp_path / "s", np.float32)
    writer = ShardWriter(tmp_path / "s", np.uint16)
    with pytest.raises(DataError, match="lengths add up to 3 but 2 ids"):
        writer.write([1, 2], [3])
    with pytest.raises(DataError, match="without a document begun"):
        writer.end_document()
    writer.extend([1])
    with pytest.raises(DataError, match="still open"):
        writer.write([2], [1])
    writer.abort()
    monkeypatch.setattr(shards, "LONGEST_DOCUMENT", 4)
    with pytest.raises(DataError, match="a document has 5 tokens, more than 4"):
        ShardWriter(tmp_path / "s", np.uint16).write([1, 2, 3, 4, 5], [5])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda raw: raw[:20], "truncated: 20 bytes are less than its header"),
        (lambda raw: b"TNTIDX\x00\x00\x00" + raw[9:], "is not a Megatron index"),
        (lambda raw: raw[:9] + struct.pack("<Q", 2) + raw[17:], "has version 2"),
        (lambda raw: raw[:17] + b"\x06" + raw[18:], "type code 6, which is not one of integers"),
        (lambda raw: raw[:26] + struct.pack("<Q", 0) + raw[34:], "no document entries"),
        (lambda raw: raw[:-8], "its header announces"),
        (lambda raw: raw[:18] + struct.pack("<Q", 2**63) + raw[26:], "its header announces"),
        (lambda raw: raw[:-8] + struct.pack("<q", 5), "documents end at sequence 5 of 3"),
        (lambda raw: raw[:34] + struct.pack("<3i", 2, 2, -1) + raw[46:], "its index expects"),
    ],
)
def test_a_damaged_index_is_refused_in_a_sentence(tmp_path: Path, damage, sentence: str) -> None:  # type: ignore[no-untyped-def]
    write_shard_independently(tmp_path / "s", [[1, 2], [3, 4], [5]], 8, "<u2")
    index = tmp_path / "s.idx"
    index.write_bytes(damage(index.read_bytes()))
    with pytest.raises(DataError, match=sentence) as caught:
        Shard(tmp_path / "s")
    assert "\n" not in str(caught.value) and str(index.parent) in str(caught.value)


def test_an_index_that_points_outside_is_an_error_not_a_crash(tmp_path: Path) -> None:
    write_shard_independently(tmp_path / "s", [[1, 2], [3, 4], [5]], 8, "<u2")
    index = tmp_path / "s.idx"
    raw = bytearray(index.read_bytes())
    raw[34 + 12 + 0 : 34 + 12 + 8] = struct.pack("<q", 2**40)
    index.write_bytes(raw)
    with pytest.raises(DataError, match="document 0 spans the bytes"):
        Shard(tmp_path / "s").document(0)
    with pytest.raises(IndexError):
        Shard(tmp_path / "s").document(3)
