"""The benchmarks of training at a tiny size: they run, and their figures mean what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import checkpoint_stall, loop_overhead, recording, utilisation, zero_stages

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
        assert row["engine_ratio"] == pytest.approx(row["loop_seconds"] / row["engine_seconds"])
        for kind, seconds in row["steps"].items():
            assert row[f"{kind}_seconds"] == min(seconds) and len(seconds) == 2


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
    for row in found:
        assert row["stall_seconds"] > 0 and row["mib"] > 0.5 and len(row["step_seconds_since"]) == 4
        assert row["cost_seconds"] == pytest.approx(row["stall_seconds"] + row["slower_seconds"])


def test_utilisation(results: Path) -> None:
    small = ["--presets", "tiny", "--length", "32", "--vocabulary", "128", "--largest", "3", "--not-compiled"]
    utilisation.main(["--device", "cpu", *small, "--policies", "none", "recursion", "--name", "d"])
    found = rows(results, "d")
    assert {(row["variant"], row["policy"]) for row in found} == {
        (variant, policy) for variant in ("vanilla", "mor") for policy in ("none", "recursion")
    }
    assert all(1 <= row["micro_batch"] <= 3 and row["mfu"] is None for row in found)
    best = json.loads((results / "d.json").read_text(encoding="utf-8"))["best"]
    for row in best:
        own = [other for other in found if other["variant"] == row["variant"]]
        assert row["tokens_per_second"] == max(other["tokens_per_second"] for other in own)
        assert row["loop_tokens_per_second"] > 0 and row["recipe"]["batch"]["micro_batch"] == row["micro_batch"]


def test_micro_batches_that_are_tried() -> None:
    assert list(utilisation.sizes(20)) == [1, 2, 3, 4, 6, 8, 12, 16]
    assert list(utilisation.sizes(3)) == [1, 2, 3]


@pytest.mark.gpu
def test_utilisation_of_a_gpu(results: Path) -> None:
    small = ["--presets", "tiny", "--length", "128", "--vocabulary", "512", "--largest", "2", "--policies", "none"]
    utilisation.main([*small, "--name", "e"])
    found = rows(results, "e")
    assert {(row["variant"], row["compiled"]) for row in found} == {
        (variant, compiled) for variant in ("vanilla", "mor") for compiled in (False, True)
    }
    assert all(row["peak_gib"] > 0 and (row["mfu"] is None or 0 < row["mfu"] < 1) for row in found)
