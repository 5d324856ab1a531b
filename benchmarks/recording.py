"""What a benchmark needs: machine and versions beside the figures, a steady heap, results as JSON and markdown."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
# Freed memory stays in the heap: otherwise the larger of two models timed in turns pays for its pages every time.
STEADY_HEAP = {
    "MALLOC_MMAP_THRESHOLD_": str(16 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(32 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}


def restart_with_steady_heap(**variables: str) -> None:
    """Run the program anew with the allocator set as above, and with more variables, unless it is; glibc reads these at
    the start only.
    """
    wanted = {**STEADY_HEAP, **variables}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **wanted})


def processor() -> str:
    """The model of this machine's processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def commit(checkout: Path = RESULTS.parents[1]) -> str:
    """The commit that is checked out, and whether its files were changed since; recorded results do not count."""
    git = ["git", "-C", str(checkout)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    status = [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"]
    changed = subprocess.run(status, capture_output=True, text=True)
    return head.stdout.strip() + (" with local changes" if changed.stdout.strip() else "")


def machine(device: str) -> dict[str, Any]:
    """Where and with what a figure was measured."""
    import torch

    described: dict[str, Any] = {"cpu": processor(), "threads": torch.get_num_threads()}
    if device == "cuda":
        described["gpu"] = torch.cuda.get_device_name()
    return {
        **described,
        "python": platform.python_version(),
        "torch": version("torch"),
        "load": round(os.getloadavg()[0], 1),
        "commit": commit(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }


def table(titles: str, cells: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """A markdown table: titles, and a format of one row's values, both parted by ` | `."""
    parting = " | ".join("---" for _ in titles.split(" | "))
    return "\n".join(f"| {line} |" for line in (titles, parting, *(cells.format(**row) for row in rows)))


def record(name: str, result: dict[str, Any], table: str) -> None:
    """Write `results/NAME.json` and `results/NAME.md`, and print the latter."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    where = result["machine"]
    device = where.get("gpu", f"{where['cpu']}, {where['threads']} threads")
    text = (
        f"# {name}\n\n{table}\n\n"
        f"{device}; load average {where['load']} of {os.cpu_count()} processors at the end; "
        f"Python {where['python']}, torch {where['torch']}; commit {where['commit']}.\n"
        f"Command: `{where['command']}`\n"
    )
    (RESULTS / f"{name}.md").write_text(text)
    print(text)
