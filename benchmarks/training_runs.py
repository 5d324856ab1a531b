"""Shared by the benchmarks of training: random data, a recipe, ranks on this machine, and their records."""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.recording import machine, record, table
from tests.data_prep.support import EOD, write_dataset
from tests.pretrain.support import Job, metrics

WIDTHS = {"tiny": (64, 4, 2), "6m": (256, 8, 4), "30m": (512, 8, 8), "85m": (768, 12, 12)}


# The allocator returns freed memory to the system at once.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def parser(description: str | None, name: str, *, size: str, length: int, steps: int) -> argparse.ArgumentParser:
    """A parser with the options of every training benchmark; `--help` shows the first line of `description`."""
    options = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    options.add_argument("--size", choices=sorted(WIDTHS), default=size)
    options.add_argument("--length", type=int, default=length)
    options.add_argument("--vocabulary", type=int, default=4096)
    options.add_argument("--steps", type=int, default=steps)
    options.add_argument("--name", default=name)
    return options


def run(
    measure: Callable[[argparse.Namespace, Path], list[dict[str, Any]]],
    options: argparse.Namespace,
    caption: str,
    titles: str,
    cells: str,
) -> None:
    """Record the rows that `measure` returns; it gets an empty folder to work in.

    Args:
        caption: text above the table, a format of the options. titles, cells: see `recording.table`.
    """
    with tempfile.TemporaryDirectory(prefix=f"{options.name}-") as folder:
        rows = measure(options, Path(folder))
    result = {"rows": rows, "options": vars(options), "machine": machine("cpu")}
    record(options.name, result, f"{caption.format(**vars(options))}\n\n{table(titles, cells, rows)}")


def random_data(folder: Path, vocabulary: int, tokens: int) -> Path:
    """A data set of documents of 500 random tokens."""
    ids = np.random.default_rng(0).integers(1, vocabulary, (max(2, tokens // 500), 499))
    documents = [[*row, EOD] for row in ids.tolist()]
    write_dataset(folder, {"train": [("random", documents)]}, vocabulary=vocabulary)
    return folder


def network(size: str, variant: str, vocabulary: int, length: int) -> dict[str, Any]:
    """The model section of a recipe: a network of `WIDTHS` whose recursive variants have R=2 over the same layers."""
    width, layers, heads = WIDTHS[size]
    values: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": heads,
        "intermediate_size": 8 * width // 3 // 16 * 16,
        "context_length": length,
    }
    if variant != "vanilla":
        values |= {"sharing": "middle_cycle", "recursions": 2}
    if variant == "mor":
        values |= {"router": {"kind": "expert_choice"}}
    return values


def recipe_of(
    folder: Path, model: dict[str, Any], *, steps: int, sequences: int, micro_batch: int, **changes: Any
) -> dict[str, Any]:
    """A recipe without evaluation, and without checkpoints before the end; it records every step."""
    length = model["context_length"]
    values: dict[str, Any] = {
        "name": "benchmark",
        "model": model,
        "data": {"path": str(random_data(folder / "data", model["vocab_size"], (steps + 1) * sequences * length))},
        "schedule": {"kind": "constant", "warmup": 0},
        "budget": {"steps": steps},
        "batch": {"sequences": sequences, "micro_batch": micro_batch, "sequence_length": length},
        "precision": "fp32",
        "activation_checkpointing": "none",
        "checkpoint": {"every": 0, "keep": 1},
        "evaluation": {"every": 0},
        "logging": {"every": 1},
        "run_dir": str(folder / "run"),
    }
    return {**values, **changes}


def train(folder: Path, values: dict[str, Any], ranks: int, *arguments: str, **variables: str) -> str:
    """Train a recipe on `ranks` ranks of this machine, with more environment variables; returns their output."""
    shutil.rmtree(values["run_dir"], ignore_errors=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    codes, output, errors = Job(file, *arguments, ranks=ranks, extra=variables).wait(timeout=1800)
    if any(codes):
        raise RuntimeError(f"exit codes {codes}\n{output}\n{errors}")
    return output


def records(values: dict[str, Any], kind: str = "train") -> list[dict[str, Any]]:
    """The run's records of one kind."""
    return metrics(Path(values["run_dir"]), kind)


def median(rows: list[dict[str, Any]], name: str, warmup: int = 1) -> float:
    """Median of a figure over the steps after the first `warmup`."""
    return statistics.median(row[name] for row in rows[warmup:])
