"""Training sequences per second from one reader, compared with what a 360m model can consume on an H200.

    python -m benchmarks.reader_throughput --out benchmarks/results

Assumption: the model trains at 100 % of the H200's dense bf16 peak (989e12 FLOP/s). Real runs reach less and consume
less. Its FLOPs per token are those of `mor_model.flops` for the vanilla 360m preset at 2048 tokens. The target is 50
times that consumption. One process, one thread; each figure is the best of three rounds, because other work on the
machine can only slow it down.

Peer: nanoGPT's way of reading, a `numpy.memmap` sliced at random places, without order, epochs or checks.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.recording import commit, processor
from data_prep.files import write_json, write_text
from data_prep.reading.dataset import document_ids, open_dataset
from data_prep.reading.manifest import Manifest, Shard, Split, write_manifest
from data_prep.reading.mixture import Mixture, MixtureSource, Phase
from data_prep.reading.packed import PackedDataset
from data_prep.reading.sample_order import SampleOrder
from data_prep.reading.shards import ShardWriter
from data_prep.tokenizers.base import TokenizerInfo
from data_prep.tokenizing.packing import write_packing
from mor_model.flops import flops_per_token
from mor_model.presets import preset

LENGTH = 2048
BATCH = 512
PEAK = 989e12
TARGET = 50
SHARDS = 8
SHARD_TOKENS = 1 << 25
SOURCES = 4
TRILLION_SHARDS = 20


def write_data(folder: Path) -> None:
    """Random ids in documents of 700 tokens on average: 268 million tokens, half a gigabyte."""
    generator = np.random.default_rng(0)
    entries = []
    for number in range(SHARDS):
        name = f"train-{number:05d}"
        ids = generator.integers(1, 49_152, SHARD_TOKENS, np.uint16)
        ends = np.unique(np.append(generator.integers(2, SHARD_TOKENS, SHARD_TOKENS // 700), SHARD_TOKENS))
        ids[ends - 1] = 0
        with ShardWriter(folder / name, np.uint16) as writer:
            writer.write(ids, np.diff(ends, prepend=0))
        made = writer.summary
        source = f"source-{number % SOURCES}"
        entries.append(Shard(name, made.tokens, made.documents, 0, made.sha256_bin, made.sha256_idx, source))
        write_packing(folder / name, LENGTH)
    save_manifest(folder, entries)


def write_sparse_trillion(folder: Path) -> None:
    """A trillion tokens of zeros in sparse files, which occupy no disk space."""
    tokens, documents = 10**12 // TRILLION_SHARDS, 50_000_000
    entries = []
    for number in range(TRILLION_SHARDS):
        name = f"train-{number:05d}"
        with (folder / f"{name}.bin").open("wb") as stream:
            stream.truncate(2 * tokens)
        with (folder / f"{name}.idx").open("wb") as stream:
            stream.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, documents, documents + 1))
            stream.truncate(34 + 20 * documents + 8)
            length = tokens // documents
            for position, value in (
                (34 + 4 * (documents - 1), struct.pack("<i", length)),
                (34 + 12 * documents - 8, struct.pack("<q", 2 * (tokens - length))),
                (34 + 20 * documents, struct.pack("<q", documents)),
            ):
                stream.seek(position)
                stream.write(value)
        entries.append(Shard(name, tokens, documents, 0, "0" * 64, "0" * 64, "web"))
    save_manifest(folder, entries)


def save_manifest(folder: Path, entries: list[Shard]) -> None:
    tokenizer = TokenizerInfo("tiktoken", "f" * 64, 49_152, 0, "made-up")
    write_manifest(folder, Manifest(tokenizer=tokenizer, dtype="uint16", splits={"train": Split(tuple(entries))}))


def rate(read: Callable[[int], int], rounds: int = 3, seconds: float = 1.5) -> float:
    """Tokens per second of `read`, best of the rounds. `read` maps the call's number to a number of tokens."""
    best = 0.0
    call = 0
    for _ in range(rounds):
        tokens, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            tokens += read(call)
            call += 1
        best = max(best, tokens / (time.perf_counter() - start))
    return best


def measure(folder: Path) -> dict[str, float]:
    """Tokens per second for each way of reading, with the files in the page cache."""
    data = open_dataset(folder, verify="checksums")  # also brings the files into the page cache
    order = SampleOrder(data.num_sequences(LENGTH), seed=1)
    packed = PackedDataset(data, LENGTH)
    packed_order = SampleOrder(packed.num_sequences(LENGTH), seed=1)
    sources = [MixtureSource(name, data.only(name)) for name in data.sources]
    weights = {name: 1.0 + number for number, name in enumerate(data.sources)}
    mixture = Mixture(sources, LENGTH, [Phase(0, weights)], seed=1)
    raw = np.memmap(folder / "train-00000.bin", np.uint16, "r")
    generator = np.random.default_rng(1)

    def shuffled(call: int) -> int:
        return data.batch(order.block(call * BATCH, BATCH).tolist(), LENGTH).size

    def one_by_one(call: int) -> int:
        return sum(data.sequence(order[sample], LENGTH).size for sample in range(call * BATCH, (call + 1) * BATCH))

    def mixed(call: int) -> int:
        return mixture.batch(call * BATCH, BATCH).size

    def best_fit(call: int) -> int:
        return packed.batch(packed_order.block(call * BATCH, BATCH).tolist(), LENGTH).size

    def documents(call: int) -> int:
        return document_ids(data.batch(order.block(call * BATCH, BATCH).tolist(), LENGTH), data.eod_id).size

    def nanogpt(_call: int) -> int:
        places = generator.integers(0, raw.size - LENGTH - 1, BATCH)
        return np.stack([raw[place : place + LENGTH + 1].astype(np.int64) for place in places]).size

    return {
        "one data set, batches of 512": rate(shuffled),
        "one data set, sequence by sequence, as views not yet read": rate(one_by_one),
        "mixture of 4 sources": rate(mixed),
        "best-fit packed": rate(best_fit),
        "one data set, with document numbers": rate(documents),
        "peer: numpy.memmap at random places": rate(nanogpt),
    }


_TRILLION = """
import sys, time
start = time.perf_counter()
from data_prep.reading.dataset import open_dataset
from data_prep.reading.sample_order import SampleOrder
imported = time.perf_counter()
data = open_dataset(sys.argv[1])
order = SampleOrder(data.num_sequences(2048), seed=1)
data.batch(order.block(0, 512).tolist(), 2048)
done = time.perf_counter()
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
print(imported - start, done - imported, peak)
"""


def measure_trillion(folder: Path) -> dict[str, float]:
    """Open a trillion tokens and read the first 512 sequences in a separate process; best of three."""
    runs = [
        subprocess.run([sys.executable, "-c", _TRILLION, str(folder)], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    figures = min((list(map(float, run.stdout.split())) for run in runs), key=lambda figure: figure[1])
    return {"import_seconds": figures[0], "open_and_first_batch_seconds": figures[1], "peak_resident_mb": figures[2]}


def machine() -> dict[str, Any]:
    """Hardware, versions, load and commit of the measurement."""
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "commit": commit(),
        "load_average": os.getloadavg()[0],
    }


def render(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "# Reader throughput",
        "",
        f"One process, sequences of {LENGTH} tokens, files in the page cache.",
        f"Assumption: a 360m model at {result['assumption']['flops_per_token']:.3e} training FLOPs a token and 100 % "
        f"of {PEAK:.3e} FLOP/s consumes {result['assumption']['tokens_per_second']:,.0f} tokens/s.",
        "",
        "| way of reading | million tokens/s | times the model |",
        "|---|---|---|",
    ]
    for name, value in result["tokens_per_second"].items():
        lines.append(f"| {name} | {value / 1e6:,.1f} | {value / result['assumption']['tokens_per_second']:,.0f} |")
    trillion = result["trillion_tokens"]
    lines += [
        "",
        f"A trillion tokens (sparse files): {trillion['open_and_first_batch_seconds']:.3f} s to open and read the "
        f"first 512 sequences, {trillion['peak_resident_mb']:.0f} MB resident at most (import of the package: "
        f"{trillion['import_seconds']:.2f} s).",
        "",
        f"{result['machine']['cpu']}, {result['machine']['cores']} cores, {result['machine']['memory_gb']} GB, "
        f"Python {result['machine']['python']}, numpy {result['machine']['numpy']}, commit "
        f"{result['machine']['commit']}, load average {result['machine']['load_average']:.1f} at the start.",
        "",
        f"    {result['command']}",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for reader_throughput.json and .md")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "machine": machine(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }
    per_token = 3 * flops_per_token(preset("360m"), LENGTH).forward
    consumed = PEAK / per_token
    result["assumption"] = {"flops_per_token": per_token, "peak": PEAK, "mfu": 1.0, "tokens_per_second": consumed}
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        result["tokens_per_second"] = measure(Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        write_sparse_trillion(Path(folder))
        result["trillion_tokens"] = measure_trillion(Path(folder))
    write_json(arguments.out / "reader_throughput.json", result)
    write_text(arguments.out / "reader_throughput.md", render(result))
    print(render(result))
    slowest = min(value for name, value in result["tokens_per_second"].items() if not name.startswith("peer"))
    if slowest < TARGET * consumed:
        raise SystemExit(f"below the target of {TARGET} times the model's consumption")


if __name__ == "__main__":
    main()
