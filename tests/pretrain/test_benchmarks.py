"""The benchmarks of training at a tiny size: they run, and their figures mean what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import checkpoint_stall, loop_overhead, recording, zero_stages

pytestmark = pytest.mark.slow
TINY = ("--size", "tiny", "--length", "32", "--vocabulary", "128")


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(recording, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def rows(results: Path, name: str) -> list[dict[str, Any]]:
    assert (results / f"{name}.md").read_text(encoding="utf-8").startswith(f"# {name}\n")
    return json.loads((results / f"{name}.json").read_text(encoding="utf-8"))["rows"]


def test_loop_overhead(results: Path) -> None:
    loop_overhead.main([*TINY, "--stages", "zero0", "--steps", "4", "--rounds", "1", "--name", "a"])
    found = rows(results, "a")
    assert [row["model"] for row in found] == ["vanilla", "mor"]
    for row in found:
        assert row["ratio"] == pytest.approx(row["loop_seconds"] / row["bare_seconds"])
        assert row["loop_seconds"] >= sum(row["parts"].values()) * 0.99 and 0 <= row["data_share"] < 1
        assert row["loop_seconds"] <= min(row["steps"]["loop"]) and len(row["steps"]["bare"]) == 2


def test_zero_stages(results: Path) -> None:
    zero_stages.main([*TINY, "--stages", "zero1", "zero3", "--precisions", "fp32", "--steps", "3", "--name", "b"])
    found = rows(results, "b")
    assert [row["stage"] for row in found] == ["zero1", "zero3"]
    for row in found:
        assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(2 * 2 * 2 * 32, rel=0.5)
        assert row["communication"] > 0 and row["peak_mib"] > 0 and row["estimate_mib"] > 0


def test_checkpoint_stall(results: Path) -> None:
    checkpoint_stall.main([*TINY, "--steps", "10", "--every", "4", "--name", "c"])
    found = rows(results, "c")
    assert [row["written"] for row in found] == ["at once", "by a thread"]
    assert all(row["stall_seconds"] > 0 and row["mib"] > 0.5 for row in found)
