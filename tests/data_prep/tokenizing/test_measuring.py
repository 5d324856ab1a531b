"""The benchmarks of data preparation at a tiny size: they run, and what they compare wrote the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
import zstandard

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "column", "found"),
    [
        ("data_prep_scaling", ["--counts=2"], "way", {"workers", "array tasks and merge"}),
        ("data_prep_tokenize", ["--workers=1"], "contender", {"here", "here, without start-up", "datasets.map"}),
    ],
)
def test_a_benchmark_measures_every_way(
    tmp_path: Path, byte_bpe: Path, name: str, options: list[str], column: str, found: set[str]
) -> None:
    lines = b"\n".join(orjson.dumps({"text": f"Document {number} of the corpus."}) for number in range(300))
    source = tmp_path / "source.jsonl.zst"
    source.write_bytes(zstandard.compress(lines))
    inputs = [f"--source={source}", f"--tokenizer={byte_bpe}", f"--out={tmp_path}", "--megabytes=0.1", "--rounds=1"]
    command = [sys.executable, "-m", f"benchmarks.{name}", *inputs, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(next(tmp_path.glob(f"{name}*.json")).read_text(encoding="utf-8"))
    assert found <= {row[column] for row in result["rows"]}
    assert result.get("same_bytes", True) and f"-m benchmarks.{name}" in result["command"]
