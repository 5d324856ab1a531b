"""A trillion tokens, as sparse files: opening and the first batch cost what they cost for a million."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

from data_prep.reading.manifest import Manifest, Shard, Split, write_manifest
from data_prep.tokenizers.base import TokenizerInfo
from tests.conftest import skip_or_fail

SHARDS = 20
TOKENS = 50_000_000_000  # of each shard
DOCUMENTS = 50_000_000

# Run in a process of its own, so that its memory is that of reading alone.
READ = """
import json, sys
from data_prep.reading.dataset import open_dataset
from data_prep.reading.sample_order import SampleOrder

read = lambda: int(open("/proc/self/io").read().split("rchar: ")[1].split()[0])
before = read()
data = open_dataset(sys.argv[1])
opened = read() - before
order = SampleOrder(data.num_sequences(2048), seed=1)
batch = data.batch(order.block(0, 512), 2048)
far = data.sequence(data.num_sequences(2048) - 1, 2048)
print(json.dumps({"tokens": data.num_tokens, "sequences": data.num_sequences(2048), "shape": batch.shape,
                  "last": int(far[-1]), "opened": opened,
                  "peak": int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024}))
"""


def write_sparse_shard(prefix: Path) -> None:
    """A shard of zeros that takes no room on the disk; the ends of the index, and the last id, are written."""
    with Path(f"{prefix}.bin").open("wb") as stream:
        stream.truncate(2 * TOKENS)
        stream.seek(2 * TOKENS - 2)
        stream.write(struct.pack("<H", 77))
    length = TOKENS // DOCUMENTS
    with Path(f"{prefix}.idx").open("wb") as stream:
        stream.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, DOCUMENTS, DOCUMENTS + 1))
        stream.truncate(34 + 12 * DOCUMENTS + 8 * (DOCUMENTS + 1))
        for position, value in (
            (34 + 4 * (DOCUMENTS - 1), struct.pack("<i", length)),
            (34 + 12 * DOCUMENTS - 8, struct.pack("<q", 2 * (TOKENS - length))),
            (34 + 20 * DOCUMENTS, struct.pack("<q", DOCUMENTS)),
        ):
            stream.seek(position)
            stream.write(value)


def test_a_trillion_tokens_open_and_read_in_bounded_memory(tmp_path: Path) -> None:
    try:
        for number in range(SHARDS):
            write_sparse_shard(tmp_path / f"train-{number:05d}")
    except OSError as error:
        skip_or_fail(f"the file system of {tmp_path} cannot hold sparse files of {2 * TOKENS} bytes ({error})")
    entries = [
        Shard(f"train-{number:05d}", TOKENS, DOCUMENTS, 4 * TOKENS, "0" * 64, "0" * 64, "web")
        for number in range(SHARDS)
    ]
    tokenizer = TokenizerInfo("tiktoken", "f" * 64, 49_152, 0, "made-up")
    write_manifest(tmp_path, Manifest(tokenizer=tokenizer, dtype="uint16", splits={"train": Split(tuple(entries))}))
    used = sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir())
    assert used < 10e6  # otherwise the files are not sparse and the test measures the disk
    run = subprocess.run([sys.executable, "-c", READ, str(tmp_path)], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    assert found["tokens"] == 10**12 and found["shape"] == [512, 2049]
    assert found["sequences"] == (10**12 - 1) // 2048
    assert found["last"] == 0
    assert found["opened"] < 2e6  # bytes, the package's own code included; an index has a gigabyte
    assert found["peak"] < 200  # MB
