"""The figures of docs/scale.md are calculated here again, from the formulas it gives and from what the code says."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from mor_model.flops import count_parameters, flops_per_sequence
from mor_model.presets import preset

TEXT = " ".join((Path(__file__).resolve().parents[3] / "docs" / "scale.md").read_text(encoding="utf-8").split())
RANKS, FEW = 512, 16
FILES = 1590 + 71
CONFIG = preset("1.7b")
P = count_parameters(CONFIG).total_stored
HASHED, DISK, LINK = 0.42e9, 20e9, 50e9  # bytes a second
GPU_HOURS = 16384 * 54 * 24 / 419  # between two interruptions of Llama 3
RECORDS = 100_000 // 10


def interval(cost: float, between: float) -> float:
    """Young's time between checkpoints, in seconds."""
    return math.sqrt(2 * cost * between)


FIGURES = [
    (f"{FILES:,} = {RANKS * FILES / 1e3:,.0f},000", "files opened by all ranks"),
    (f"| {FEW * FILES / 1e3:.0f} thousand | {RANKS * FILES / 1e3:.0f} thousand |", "the same in the summary"),
    (f"850,000 x 3 / 50,000 = {850_000 * 3 / 50_000:.0f} s", "requests to the metadata server"),
    (f"64 x 5 GB at 20 GB/s = {64 * 5e9 / DISK:.0f} s", "reading an image"),
    (f"| {2 * FEW} | {2 * RANKS:,} |", "connections of rank 0"),
    (f"5 s: {RANKS * 2 / 5:.0f} a second", "messages between ranks"),
    (f"(26 + 4 G) x 8 bytes = {(26 + 4 * RANKS) * 8 / 1e3:.1f} kB", "the step's all-reduce"),
    (f"{1024 * 2048 * 2 / 1e6:.1f} MB for 1,024 x 2,048 tokens", "data of a step"),
    (f"3 x 2 P bytes in and out of every GPU, {3 * 2 * P / 1e9:.1f} GB", "ZeRO-3"),
    (f"that is {3 * 2 * P / LINK:.2f} s", "its time"),
    (f"2 x {flops_per_sequence(CONFIG, 2048).training:.2e} /".replace("e+", "e"), "FLOPs of a sequence"),
    (f"= {2 * flops_per_sequence(CONFIG, 2048).training / (989e12 * 0.4):.2f} s, of 8 sequences", "two sequences"),
    (f"of 8 sequences {8 * flops_per_sequence(CONFIG, 2048).training / (989e12 * 0.4):.2f} s", "eight sequences"),
    (f"(1.7b: 16 P = {16 * P / 1e9:.0f} GB)", "what a GPU holds without sharding"),
    (f"{14 * count_parameters(preset('360m')).total_stored / 1e9:.1f} GB for 360m", "a checkpoint of 360m"),
    (f"{14 * P / 1e9:.0f} GB for 1.7b", "a checkpoint of 1.7b"),
    (f"{14 * P / RANKS / 1e6:.0f} MB at 512 ranks", "one rank's part"),
    (f"| {14 * P / DISK:.1f} s | {14 * P / DISK:.1f} s |", "writing it"),
    (f"{14 * P / 2e9:.0f} s on a file server of 2 GB/s", "writing it slowly"),
    (f"14 P / G / 0.42 GB/s = {14 * P / RANKS / HASHED:.1f} s", "its checksums"),
    (f"14 P / 0.42 GB/s = {14 * P / HASHED:.0f} s for 1.7b", "checking it"),
    (f"| {2 * FEW + 1} | {2 * RANKS + 1:,} |", "files of a checkpoint"),
    (f"one in {GPU_HOURS / 1e3:.0f},000 GPU hours", "failures"),
    (f"512 GPUs then fail every {GPU_HOURS / RANKS:.0f} hours", "failures of this many"),
    (f"| {GPU_HOURS / FEW / 24:.0f} days | {GPU_HOURS / RANKS / 24:.1f} days |", "the same in days"),
    (f"every {interval(2, GPU_HOURS / RANKS * 3600) / 60:.0f} minutes, and", "Young's interval"),
    (f"and {2 / interval(2, GPU_HOURS / RANKS * 3600):.1%}".replace("%", " %"), "its cost"),
]


@pytest.mark.parametrize("words", [words for words, _ in FIGURES], ids=[what for _, what in FIGURES])
def test_figures(words):
    assert words in TEXT


def test_mixture_of_recursions_stores_half():
    counted = count_parameters(preset("1.7b", "mor", 3))
    assert f"{counted.total_stored / 1e9:.2f}e9 of {counted.applied / 1e9:.2f}e9 at 1.7b, R = 3" in TEXT


def test_lines_of_metrics():
    match = re.search(
        r"has ([\d,]+) bytes .*? and (\d+) more for each rank .*?: ([\d.]+) kB at 512 ranks, (\d+) MB", TEXT
    )
    assert match
    line, more, kilobytes, megabytes = (float(part.replace(",", "")) for part in match.groups())
    assert kilobytes == pytest.approx((line + more * RANKS) / 1e3, abs=0.05)
    assert megabytes == pytest.approx((line + more * RANKS) * RECORDS / 1e6, abs=1)
    assert f"| {(line + more * FEW) * RECORDS / 1e6:.0f} MB | {megabytes:.0f} MB |" in TEXT
