"""Corpora, tokenizers and runs of the writing side for its tests."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
import zstandard
from tokenizers import decoders, models, pre_tokenizers, trainers

from data_prep.cli import app
from data_prep.sources.base import ReadOptions
from data_prep.tokenizing.pipeline import Job, tokenize
from data_prep.tokenizing.shard_plan import Settings
from tests.data_prep.small_tokenizers import trained_sentencepiece

_WORDS = (
    "the a of and to in is it that was for on with as his they be at one have this from or had by not word but what "
    "some we can out other were all there when up use your how said an each she which do their time if will way about "
    "many then them write would like so these her long make thing see him two has look more day could go come did "
    "number sound no most people my over know water than call first who may down side been now find 7 12 1984 3.14 "
    "naïve café Ωmega 漢字 🙂 don't it's they'll"
)
WORDS = _WORDS.split()


def sentences(count: int, seed: int) -> str:
    """Text of `count` lines that looks like prose with digits, accents and paragraphs."""
    source = random.Random(seed)
    lines = []
    for _ in range(count):
        words = [source.choice(WORDS) for _ in range(source.randint(3, 14))]
        lines.append(" ".join(words).capitalize() + source.choice([".", "!", "?", "...", ""]))
        if source.random() < 0.1:
            lines.append("")
    return "\n".join(lines)


def documents(count: int, seed: int = 0, lines: int = 8) -> list[str]:
    """`count` different texts."""
    source = random.Random(seed)
    return [f"{number}. " + sentences(source.randint(1, lines), seed * 100_003 + number) for number in range(count)]


def compressed(data: bytes, suffix: str) -> bytes:
    """`data` as a file with that ending holds it."""
    return {
        "": lambda: data,
        ".gz": lambda: gzip.compress(data, 1),
        ".zst": lambda: zstandard.ZstdCompressor(level=1, write_checksum=True).compress(data),
        ".xz": lambda: lzma.compress(data, preset=0),
        ".bz2": lambda: bz2.compress(data, 1),
    }[suffix]()


def jsonl(texts: Iterable[str], **more: object) -> bytes:
    """JSON lines with the field `text`."""
    return b"".join(json.dumps({"text": text, **more}, ensure_ascii=False).encode() + b"\n" for text in texts)


def write_jsonl(path: Path, texts: Iterable[str], **more: object) -> Path:
    """A JSON lines file, compressed as its name says."""
    suffix = path.suffix if path.suffix in (".gz", ".zst", ".xz", ".bz2") else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(compressed(jsonl(texts, **more), suffix))
    return path


def small_byte_bpe(path: Path) -> Path:
    """Train a small tokenizer.json with the `tokenizers` library itself."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sentences(400, 1)], trainer)
    tokenizer.save(str(path))
    return path


def small_sentencepiece(path: Path) -> Path:
    """A sentencepiece model with Llama's settings (dummy prefix, byte fallback), 400 entries."""
    options = {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "character_coverage": 0.99}
    return trained_sentencepiece(path, sentences(400, 2), remove_extra_whitespaces=False, **options)


class Quiet:
    """A listener that remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.steps = 0

    def say(self, message: str) -> None:
        self.said.append(message)

    def begin(self, plan, schedule) -> None:
        self.plan = plan
        self.found = len(schedule.receipts)

    def progress(self, worker, key, progress) -> None:
        self.steps += 1


def job(sources: Sequence[object], out: Path, tokenizer: Path, *, options: ReadOptions | None = None, **more) -> Job:
    """A job; keyword arguments that are not the job's own are settings."""
    own = {key: more.pop(key) for key in ("eod_token", "max_rejects", "max_broken") if key in more}
    settings = Settings(sources=(), options=options or ReadOptions(), **more)
    return Job(tuple(str(source) for source in sources), out, str(tokenizer), settings, **own)


def run(sources: Sequence[object], out: Path, tokenizer: Path, *, workers: int = 1, **more):
    """Tokenize in this process and its workers; the manifest."""
    return tokenize(job(sources, out, tokenizer, **more), Quiet(), workers=workers)


def invoke(*arguments: object) -> None:
    """`python -m data_prep ...` in this process; raises what the command ends with."""
    app([str(argument) for argument in arguments], standalone_mode=False)


def command(*arguments: object, check: bool = True, **more) -> subprocess.CompletedProcess:
    """`python -m data_prep ...` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more.pop("environment", {})}
    return subprocess.run(
        [sys.executable, "-m", "data_prep", *map(str, arguments)],
        capture_output=True,
        text=more.pop("text", True),
        check=check,
        env=environment,
        timeout=300,
        **more,
    )


def digest(folder: Path) -> str:
    """sha256 over names and bytes of everything in a data set folder but the manifest."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            total.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
            total.update(path.read_bytes())
    return total.hexdigest()
