"""How `tokenize` scales on one machine: worker processes, MPI ranks, and array tasks with their merge.

    python -m benchmarks.data_prep_scaling --source wikipedia.jsonl.zst --tokenizer smollm/tokenizer.json

Every way must write the same bytes. It is pinned to as many processors as it has workers and is measured from the
start of the first process to the end of the last one. The ways take turns, and the best of `--rounds` counts. The
serial share s follows Amdahl's law, T2 = T1 (s + (1 - s) / 2), from the times with one and two workers. It covers
imports, loading the tokenizer and checking its encoder, which take the same time for any corpus, and the merge. It
therefore falls as the corpus grows.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.data_prep_tokenize import shown_command, take_documents
from benchmarks.recording import commit
from data_prep.files import write_json, write_text
from data_prep.reading.manifest import read_manifest


def start(command: list[str], processors: list[int]) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, processors),
    )


def run(stages: list[list[list[str]]], processors: list[int]) -> float:
    """Seconds that the stages take; the commands of one stage run at the same time.

    Raises:
        RuntimeError: a command failed; contains the end of its output.
    """
    began = time.perf_counter()
    for stage in stages:
        processes = [start(command, processors) for command in stage]
        for process in processes:
            _, said = process.communicate()
            if process.returncode:
                raise RuntimeError(f"{process.args!r} failed:\n{said.decode()[-2000:]}")
    return time.perf_counter() - began


def ways(source: Path, tokenizer: Path, out: Path, count: int) -> dict[str, list[list[list[str]]]]:
    """For each way of running `count` workers, ranks or tasks: its stages, each a list of commands."""
    python = [sys.executable, "-m", "data_prep"]
    tokenize = [*python, "tokenize", str(source), "--out", str(out), "--tokenizer", str(tokenizer)]
    tasks = [[*tokenize, "--workers=1", f"--task-index={index}", f"--task-count={count}"] for index in range(count)]
    found = {
        "workers": [[[*tokenize, f"--workers={count}"]]],
        "array tasks and merge": [tasks, [[*python, "merge", str(out), "--workers=1"]]],
    }
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun:
        launch = [mpirun, "-n", str(count), "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
        found["MPI ranks"] = [[[*launch, *tokenize, "--mpi"]]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="JSON lines, zstd")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    processors = sorted(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    best: dict[tuple[str, int], float] = {}
    checksums = set()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        size, _ = take_documents([arguments.source], int(arguments.megabytes * 1e6), folder)
        for _ in range(arguments.rounds):
            for count in arguments.counts:
                out = folder / "out"
                for way, stages in ways(folder / "corpus.jsonl.zst", arguments.tokenizer, out, count).items():
                    seconds = run(stages, processors[:count])
                    best[way, count] = min(seconds, best.get((way, count), seconds))
                    shards = read_manifest(out).splits["train"].shards
                    checksums.add(tuple(shard.sha256_bin for shard in shards))
                    shutil.rmtree(out)
    rows: list[dict[str, Any]] = []
    for (way, count), seconds in sorted(best.items()):
        once = best.get((way, 1), seconds)
        row = {
            "way": way,
            "count": count,
            "seconds": round(seconds, 2),
            "mb_per_second": round(size / 1e6 / seconds, 1),
        }
        row["faster_than_one"] = round(once / seconds, 2)
        if count > 1:
            row["serial_share"] = round((count * seconds / once - 1) / (count - 1), 2)
        rows.append(row)
    result = {
        "text_mb": round(size / 1e6, 1),
        "tokenizer": arguments.tokenizer.parent.name,
        "same_bytes": len(checksums) == 1,
        "rows": rows,
        "load_at_start": round(load, 1),
        "processors": len(processors),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("tokenizers", "fastokens", "mpi4py", "numpy")},
        "commit": commit(),
        "command": shown_command(),
    }
    write_json(arguments.out / "data_prep_scaling.json", result)
    write_text(arguments.out / "data_prep_scaling.md", table(result))
    print(table(result))


def table(result: dict[str, Any]) -> str:
    lines = [
        "# data_prep_scaling",
        "",
        f"{result['text_mb']} MB of text with the tokenizer {result['tokenizer']}, start-up and merge included; "
        f"the same bytes from all: {result['same_bytes']}.",
        "",
        "| way | count | seconds | MB/s | faster than one by | serial share |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['way']} | {row['count']} | {row['seconds']} | {row['mb_per_second']} | {row['faster_than_one']} "
        f"| {row.get('serial_share', '')} |"
        for row in result["rows"]
    ]
    versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    lines += [
        "",
        f"{result['processors']} processors, load {result['load_at_start']} at the start; Python {result['python']}; "
        f"{versions}; commit {result['commit']}.",
        f"Command: `{result['command']}`",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
