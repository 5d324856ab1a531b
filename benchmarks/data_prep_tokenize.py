"""Text to shards from end to end, compared with other tools in the same run: same documents, tokenizer and processors.

    python -m benchmarks.data_prep_tokenize --source wikipedia.jsonl.zst --tokenizer smollm/tokenizer.json \
        --megatron ../Megatron-LM --python-path ../site-with-datatrove

Every contender is a process of its own, pinned to as many processors as it has workers; start-up is included.
Contenders take turns, and the best of `--rounds` counts (`--peer-rounds` for the peers, which take minutes).
Processor seconds are those of the process and its children; other work on the machine affects them less than wall
time. Memory is the largest resident set among the processes. Peers:

- Megatron-LM's `tools/preprocess_data.py` (in the checkout `--megatron`). It reads plain JSON lines and so needs no
  decompression. Its `.bin` must equal the one written here byte for byte.
- `datasets.map` over the tokenizers library in batches, including the arrow file it writes.
- datatrove's `DocumentTokenizer`, one file per worker.
- The engines alone, on texts in memory: the reference library's `encode_batch_fast`, and the encoder used here. Compare
  the latter with `here, without start-up`.

Peers that are not installed are left out and named.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson
import psutil
import zstandard

from benchmarks.recording import commit, processor
from data_prep.files import write_json, write_text
from data_prep.reading.manifest import read_manifest

DATASETS = """
import sys, datasets, tokenizers
source, tokenizer, out, workers = sys.argv[1:]
encoder = tokenizers.Tokenizer.from_file(tokenizer)
def encode(batch):
    return {"ids": [e.ids for e in encoder.encode_batch_fast(batch["text"], add_special_tokens=False)]}
data = datasets.load_dataset("json", data_files=source, split="train", cache_dir=out + "/cache")
data.map(encode, batched=True, num_proc=int(workers), remove_columns=data.column_names)
"""
DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
if __name__ == "__main__":
    source, tokenizer, out, workers = sys.argv[1:]
    steps = [
        JsonlReader(source, glob_pattern="*.jsonl.zst", compression="zstd"),
        DocumentTokenizer(
            out + "/tokens", tokenizer_name_or_path=tokenizer, eos_token="<|endoftext|>", shuffle_documents=False
        ),
    ]
    LocalPipelineExecutor(steps, tasks=int(workers), workers=int(workers), logging_dir=out + "/logs").run()
"""
ENGINE = """
import sys, time, orjson
from data_prep.tokenizing.encoder import Engine, choose_engine
from data_prep.tokenizers.loading import load_tokenizer
texts = [orjson.loads(line)["text"] for line in open(sys.argv[1], "rb")]
tokenizer = load_tokenizer(sys.argv[2])
engine = Engine(tokenizer) if sys.argv[3] == "reference" else choose_engine(tokenizer, [])[0]
began, spent = time.perf_counter(), time.process_time()
for at in range(0, len(texts), 64):
    engine.encode(texts[at : at + 64])
print(time.perf_counter() - began, time.process_time() - spent)
"""

PIPELINE = """
import sys, time
from pathlib import Path
from data_prep.tokenizing.pipeline import Job, Share, begin, prepare
from data_prep.tokenizing.shard_plan import Settings
from data_prep.tokenizing.progress import Display
from data_prep.tokenizing.workers import Pool
source, tokenizer, out = sys.argv[1:]
display = Display()
job = Job((source,), Path(out) / "data", tokenizer, Settings((), validation=0, test=0))
plan, engine = prepare(job, display)
schedule = begin(job.out, plan, Share(), display)
began, spent = time.perf_counter(), time.process_time()
Pool(job.out, tokenizer, "", 1, display.progress).run(plan, schedule, engine)
print(time.perf_counter() - began, time.process_time() - spent)
"""


def take_documents(sources: list[Path], limit: int, folder: Path) -> tuple[int, int]:
    """Write the first `limit` bytes of text of `sources`: plain, compressed, and as two compressed files.

    Returns:
        bytes of text, number of documents.
    """
    size = documents = 0
    plain = folder / "corpus.jsonl"
    parts: list[list[bytes]] = [[], []]
    (folder / "parts").mkdir()
    with plain.open("wb") as target:
        for source in sources:
            with source.open("rb") as raw:
                stream = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
                for line in io.BufferedReader(stream, 1 << 20):
                    if size >= limit:
                        break
                    text = orjson.loads(line)["text"]
                    slim = orjson.dumps({"text": text}) + b"\n"
                    target.write(slim)
                    parts[documents % 2].append(slim)
                    size += len(text.encode())
                    documents += 1
    compressor = zstandard.ZstdCompressor(level=3)
    (folder / "corpus.jsonl.zst").write_bytes(compressor.compress(plain.read_bytes()))
    for number, part in enumerate(parts):
        (folder / "parts" / f"{number}.jsonl.zst").write_bytes(compressor.compress(b"".join(part)))
    return size, documents


def measure(command: list[str], processors: set[int], environment: dict[str, str]) -> dict[str, Any]:
    """Wall seconds, processor seconds and largest resident set of `command`, pinned to `processors`.

    Raises:
        RuntimeError: the command failed; contains the end of its output.
    """
    with tempfile.TemporaryFile("w+") as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            preexec_fn=lambda: os.sched_setaffinity(0, processors),
        )
        root, largest = psutil.Process(process.pid), 0
        while True:
            ended, status, used = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            with contextlib.suppress(psutil.Error):
                for one in [root, *root.children(recursive=True)]:
                    largest = max(largest, one.memory_info().rss)
            time.sleep(0.2)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise RuntimeError(f"{shlex.join(command[:4])} failed:\n{text[-2000:]}")
    spent = used.ru_utime + used.ru_stime
    return {"seconds": seconds, "processor_seconds": spent, "peak_mb": largest / 1e6, "printed": text}


def contenders(arguments: argparse.Namespace, folder: Path, workers: int) -> dict[str, list[str]]:
    """The command of each contender; `{out}` is replaced by an empty folder."""
    python, tokenizer = sys.executable, str(arguments.tokenizer)
    found = {
        "here": [
            python, "-m", "data_prep", "tokenize", str(folder / "corpus.jsonl.zst"), "--out", "{out}/data",
            "--tokenizer", tokenizer, "--workers", str(workers), "--validation", "0", "--test", "0",
        ],
        "datasets.map": [python, "-c", DATASETS, str(folder / "corpus.jsonl.zst"), tokenizer, "{out}", str(workers)],
    }  # fmt: skip
    if workers == 1:
        for name in ("reference", "accelerated"):
            found[f"engine alone, {name}"] = [python, "-c", ENGINE, str(folder / "corpus.jsonl"), tokenizer, name]
        found["here, without start-up"] = [
            python, "-c", PIPELINE, str(folder / "corpus.jsonl.zst"), tokenizer, "{out}"
        ]  # fmt: skip
    if arguments.megatron:
        found["Megatron preprocess_data.py"] = [
            python, "-W", "ignore", str(arguments.megatron / "tools" / "preprocess_data.py"),
            "--input", str(folder / "corpus.jsonl"), "--output-prefix", "{out}/megatron", "--append-eod",
            "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder / "tokenizer"),
            "--workers", str(workers),
        ]  # fmt: skip
    if importlib.util.find_spec("datatrove"):
        found["datatrove"] = [
            python, str(folder / "trove.py"), str(folder / "parts"), tokenizer, "{out}", str(workers)
        ]  # fmt: skip
    return found


def shown_command() -> str:
    """The command line; absolute paths are cut to their last two names."""
    shown = ("/".join(Path(word).parts[-2:]) if Path(word).is_absolute() else word for word in sys.orig_argv[1:])
    return shlex.join(["python", *shown])


def bin_digest(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, nargs="+", required=True, help="JSON lines, zstd")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json")
    parser.add_argument("--megabytes", type=float, default=60)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-rounds", type=int, default=2)
    parser.add_argument("--megatron", type=Path, help="checkout of Megatron-LM")
    parser.add_argument("--python-path", default="", help="folder with datatrove and Megatron's dependencies")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--name", default="", help="name of the result (default: data_prep_tokenize-TOKENIZER)")
    arguments = parser.parse_args()
    for path in arguments.python_path.split(os.pathsep):
        sys.path.append(path)
    here = str(Path(__file__).parents[1])
    paths = [here, *([str(arguments.megatron)] if arguments.megatron else []), arguments.python_path]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    processors = sorted(os.sched_getaffinity(0))
    rows: list[dict[str, Any]] = []
    digests: dict[str, str] = {}
    engine: dict[str, Any] = {}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        size, documents = take_documents(arguments.source, int(arguments.megabytes * 1e6), folder)
        (folder / "tokenizer").mkdir()
        shutil.copy(arguments.tokenizer, folder / "tokenizer" / "tokenizer.json")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
        (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "trove.py").write_text(DATATROVE)
        for workers in arguments.workers:
            best: dict[str, dict[str, Any]] = {}
            for turn in range(arguments.rounds):
                for contender, command in contenders(arguments, folder, workers).items():
                    if turn >= arguments.peer_rounds and not contender.startswith(("here", "engine alone, acc")):
                        continue
                    out = folder / f"out-{turn}"
                    shutil.rmtree(out, ignore_errors=True)
                    out.mkdir()
                    command = [part.replace("{out}", str(out)) for part in command]
                    found = measure(command, set(processors[:workers]), environment)
                    if contender.startswith("engine") or contender.endswith("start-up"):
                        found["seconds"], found["processor_seconds"] = map(float, found["printed"].split()[-2:])
                    if contender == "here":
                        manifest = read_manifest(out / "data")
                        engine = manifest.engine
                        shards = [out / "data" / f"{shard.name}.bin" for shard in manifest.splits["train"].shards]
                        digests[contender] = bin_digest(shards)
                    if contender.startswith("Megatron"):
                        digests[contender] = bin_digest([out / "megatron_text_document.bin"])
                    if contender not in best or found["seconds"] < best[contender]["seconds"]:
                        best[contender] = found
            for contender, found in best.items():
                rows.append(
                    {
                        "contender": contender,
                        "workers": workers,
                        "seconds": round(found["seconds"], 2),
                        "processor_seconds": round(found["processor_seconds"], 2),
                        "mb_per_second": round(size / 1e6 / found["seconds"], 2),
                        "peak_mb": round(found["peak_mb"]),
                    }
                )
    own = {row["workers"]: row for row in rows if row["contender"] == "here"}
    for row in rows:
        row["here_is_faster_by"] = round(row["seconds"] / own[row["workers"]]["seconds"], 2)
        row["here_spends_less_by"] = round(row["processor_seconds"] / own[row["workers"]]["processor_seconds"], 2)
    name = arguments.name or f"data_prep_tokenize-{arguments.tokenizer.parent.name}"
    alone = {row["contender"]: row for row in rows if row["workers"] == 1}
    share = None
    if "here, without start-up" in alone:
        raw, work = alone["engine alone, accelerated"], alone["here, without start-up"]
        share = round(raw["processor_seconds"] / work["processor_seconds"], 3)
    result = {
        "corpus": {
            "files": [path.name for path in arguments.source],
            "documents": documents,
            "text_mb": round(size / 1e6, 1),
        },
        "tokenizer": arguments.tokenizer.parent.name,
        "engine": engine,
        "same_bytes_as_megatron": len(set(digests.values())) == 1 if len(digests) == 2 else None,
        "share_of_engine": share,
        "rows": rows,
        "absent": [n for n, there in _peers(arguments).items() if not there],
        "machine": _machine(load, arguments),
        "command": shown_command(),
    }
    write_json(arguments.out / f"{name}.json", result)
    write_text(arguments.out / f"{name}.md", _markdown(name, result))
    print(_markdown(name, result))


def _peers(arguments: argparse.Namespace) -> dict[str, bool]:
    return {
        "Megatron preprocess_data.py": bool(arguments.megatron),
        "datatrove": importlib.util.find_spec("datatrove") is not None,
    }


def _machine(load: float, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "processor": processor(),
        "processors": len(os.sched_getaffinity(0)),
        "load_at_start": round(load, 1),
        "python": platform.python_version(),
        "versions": {
            package: version(package)
            for package in ("tokenizers", "fastokens", "datasets", "datatrove", "orjson", "zstandard", "numpy")
            if importlib.util.find_spec(package)
        },
        "commits": {"here": commit()} | ({"megatron": commit(arguments.megatron)} if arguments.megatron else {}),
    }


def _markdown(name: str, result: dict[str, Any]) -> str:
    corpus, machine = result["corpus"], result["machine"]
    lines = [
        f"# {name}",
        "",
        f"{corpus['text_mb']} MB of text, {corpus['documents']:,} documents of {', '.join(corpus['files'])}, "
        f"to shards; start-up included. Encoder here: {result['engine'].get('name')}. "
        f"Same bytes as Megatron's .bin: {result['same_bytes_as_megatron']}."
        + (
            f" Without start-up, the work here reaches {share} of the engine's speed on texts in memory (processor "
            "seconds)."
            if (share := result["share_of_engine"])
            else ""
        ),
        "",
        "| contender | workers | seconds | MB/s | faster here by | processor seconds | ratio | peak MB (one process) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['contender']} | {row['workers']} | {row['seconds']} | {row['mb_per_second']} "
            f"| {row['here_is_faster_by']} | {row['processor_seconds']} | {row['here_spends_less_by']} "
            f"| {row['peak_mb']} |"
        )
    versions = ", ".join(f"{package} {number}" for package, number in machine["versions"].items())
    commits = ", ".join(f"{which} {found}" for which, found in machine["commits"].items())
    lines += [
        "",
        f"{machine['processor']}, {machine['processors']} processors, load {machine['load_at_start']} at the start "
        f"(other work on the machine slows every contender); Python {machine['python']}; {versions}; "
        f"commits: {commits}.",
        f"Absent: {', '.join(result['absent']) or 'none'}. Command: `{result['command']}`",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
