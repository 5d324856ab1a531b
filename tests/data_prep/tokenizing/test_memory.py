"""Memory of a worker: bounded by its batches and the largest document, whatever the size of the corpus."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_prep.reading.manifest import read_manifest
from tests.data_prep.writing import sentences

LIMIT = 300e6


def peak_of(*arguments: object) -> float:
    """Bytes of the largest resident set of `python -m data_prep ...` with one worker, which is the process itself."""
    code = (
        "import runpy, sys\n"
        "sys.argv[0] = 'data_prep'\n"
        "try:\n    runpy.run_module('data_prep', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "print('peak', int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout.split("peak ")[-1])


def tokenized(tmp_path: Path, tokenizer: Path, lines) -> tuple[float, Path]:
    source, out = tmp_path / "a.jsonl.zst", tmp_path / "out"
    with source.open("wb") as raw, zstandard.ZstdCompressor(level=1).stream_writer(raw) as stream:
        for line in lines:
            stream.write(line)
    peak = peak_of(
        "tokenize", source, "--out", out, "--tokenizer", tokenizer, "--workers", 1, "--validation", 0, "--test", 0
    )
    return peak, out


def test_the_memory_for_a_document_below_the_cap_is_bounded(tmp_path, byte_bpe):
    """Its characters take four bytes each, for there are some beyond the basic plane among them."""
    text = sentences(16_000, 3) * 60
    peak, out = tokenized(tmp_path, byte_bpe, [json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"])
    manifest = read_manifest(out)
    assert manifest.splits["train"].documents == 1 and manifest.splits["train"].text_bytes > 36e6
    assert peak < 1e9


def test_a_row_group_is_not_held(tmp_path, byte_bpe):
    """150 MB of text in one row group; a piece cannot be less than a row group."""
    text = sentences(2000, 5)
    rows = [f"{number} {text[at : at + 5000]}" for number, at in enumerate(range(0, 60_000, 2))]
    source = tmp_path / "a.parquet"
    with pyarrow.parquet.ParquetWriter(source, pyarrow.schema([("text", pyarrow.string())]), compression="none") as out:
        out.write_table(pyarrow.table({"text": rows}), row_group_size=len(rows))
    assert pyarrow.parquet.ParquetFile(source).num_row_groups == 1
    limits = ("--validation", 0, "--test", 0, "--workers", 1, "--max-tokens", 1_000_000)
    assert peak_of("tokenize", source, "--out", tmp_path / "out", "--tokenizer", byte_bpe, *limits) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm/tokenizer.json", "llama2/tokenizer.model"])
def test_a_corpus_ten_times_larger_takes_no_more_memory(tmp_path, shared_data, name):
    tokenizer = shared_data / "tokenizers" / name
    with (shared_data / "train" / "gutenberg.jsonl.zst").open("rb") as raw:
        stream = zstandard.ZstdDecompressor().stream_reader(raw)
        lines = stream.read(30_000_000).split(b"\n")[:-1]
    once, _ = tokenized(tmp_path, tokenizer, (line + b"\n" for line in lines))
    (tmp_path / "ten").mkdir()
    ten, _ = tokenized(tmp_path / "ten", tokenizer, (line + b"\n" for _ in range(10) for line in lines))
    assert ten < LIMIT and ten < once * 1.15
