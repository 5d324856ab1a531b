"""Compressed and plain bytes: whole, damaged, cut off, in several frames."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import tracemalloc
import zlib
from contextlib import closing

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.sources.base import SourceError
from data_prep.sources.streams import ByteStream
from tests.data_prep.writing import compressed

KINDS = ("", ".gz", ".zst", ".xz", ".bz2")
DATA = bytes(random.Random(3).choices(b"abcdefgh \n", k=300_000))


def read_all(path, sizes=(1 << 16,)):
    """Everything that can be read, and the reason why it ends, if it is not the end."""
    stream, parts = ByteStream(path), []
    turn = 0
    try:
        while part := stream.read(sizes[turn % len(sizes)]):
            parts.append(part)
            turn += 1
    except SourceError as error:
        return b"".join(parts), error.reason
    finally:
        stream.close()
    return b"".join(parts), ""


@pytest.mark.parametrize("suffix", KINDS)
def test_every_kind_gives_the_bytes(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(compressed(DATA, suffix))
    assert read_all(path) == (DATA, "")
    assert read_all(path, (1, 7, 100_000)) == (DATA, "")
    with closing(ByteStream(path)) as stream:
        stream.read(10)
        stream.seek(123_456)
        assert stream.read(20) == DATA[123_456:123_476]
    if suffix:  # all frames of a file are read
        path.write_bytes(path.read_bytes() + compressed(b"", suffix) + compressed(b"end", suffix))
        assert read_all(path) == (DATA + b"end", "")


@pytest.mark.parametrize("suffix", KINDS[1:])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_file_cut_off_is_never_a_regular_end(tmp_path, suffix, share):
    path = tmp_path / f"x{suffix}"
    whole = compressed(DATA, suffix)
    path.write_bytes(whole[: int(len(whole) * share)])
    data, reason = read_all(path)
    assert reason == "broken_compression"
    assert DATA.startswith(data)
    with closing(ByteStream(path)) as stream:
        for _ in range(2):  # the error stays
            with pytest.raises(SourceError, match="broken after"):
                stream.head(len(DATA) + 1)


@pytest.mark.parametrize(
    ("suffix", "size", "most"),
    [(".zst", 300 << 20, 140), (".gz", 80 << 20, 40), (".xz", 80 << 20, 40), (".bz2", 80 << 20, 40)],
)
def test_a_tiny_file_of_an_enormous_text_stays_small_in_memory(tmp_path, suffix, size, most):
    """With bzip2, a hundred bytes stand for all of these zeros."""
    path = tmp_path / f"zeros{suffix}"
    packer = {
        ".gz": lambda: zlib.compressobj(1, wbits=31),
        ".xz": lambda: lzma.LZMACompressor(preset=0),
        ".bz2": lambda: bz2.BZ2Compressor(1),
        ".zst": lambda: zstandard.ZstdCompressor().compressobj(),
    }[suffix]()
    path.write_bytes(b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)), packer.flush()]))
    stream = ByteStream(path)
    total = 0
    tracemalloc.start()
    try:
        while part := stream.read(1 << 20):
            total += len(part)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == size and peak < most << 20


def test_zeros_behind_gzip_are_padding_and_other_bytes_are_damage(tmp_path):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(b"hello") + bytes(512))
    assert read_all(path) == (b"hello", "")
    path.write_bytes(gzip.compress(b"hello") + b"garbage")
    assert read_all(path) == (b"hello", "broken_compression")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_mutated_files_end_in_data_or_a_counted_reason(tmp_path_factory, data):
    suffix = data.draw(st.sampled_from(KINDS[1:]))
    text = data.draw(st.binary(max_size=2000))
    raw = bytearray(compressed(text, suffix))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("mutated") / f"x{suffix}"
    path.write_bytes(raw)
    found, reason = read_all(path)
    assert reason in ("", "broken_compression")
    assert read_all(path, (13,)) == (found, reason)
