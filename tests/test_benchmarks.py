"""Every benchmark of training runs at a tiny size and writes its record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import checkpoint_stall, loop_overhead, recording, utilisation, zero_stages

TINY = ["--size", "tiny", "--length", "32", "--vocabulary", "128"]
SMALL = ["--presets", "tiny", "--largest", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("main", "arguments", "rows"),
    [
        (loop_overhead.main, [*TINY, "--stages", "zero0", "--steps", "4", "--rounds", "1"], 2),
        (zero_stages.main, [*TINY, "--stages", "zero1", "zero3", "--precisions", "fp32", "--steps", "3"], 2),
        (checkpoint_stall.main, [*TINY, "--steps", "10", "--every", "4"], 2),
        (utilisation.main, [*SMALL, *TINY[2:], "--device", "cpu", "--not-compiled", "--policies", "none"], 4),
        pytest.param(
            utilisation.main,
            [*SMALL, "--length", "128", "--vocabulary", "512", "--policies", "none"],
            4,
            marks=pytest.mark.gpu,
        ),
    ],
    ids=["loop_overhead", "zero_stages", "checkpoint_stall", "utilisation", "utilisation of a GPU"],
)
def test_a_benchmark_runs_and_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, main: Callable[..., Any], arguments: list[str], rows: int
) -> None:
    monkeypatch.setattr(recording, "RESULTS", tmp_path)
    main([*arguments, "--name", "tiny"])
    assert (tmp_path / "tiny.md").read_text(encoding="utf-8").startswith("# tiny\n")
    assert len(json.loads((tmp_path / "tiny.json").read_text(encoding="utf-8"))["rows"]) >= rows
