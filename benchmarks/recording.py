"""Shared by all benchmarks: facts about the machine, a steady heap, results as JSON and Markdown."""

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
# Keep freed memory in the heap. Otherwise the larger of two models that take turns pays for its pages every time.
STEADY_HEAP = {
    "MALLOC_MMAP_THRESHOLD_": str(16 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(32 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}


def restart_with_steady_heap(**variables: str) -> None:
    """Restart the program with `STEADY_HEAP` and `variables` in its environment, unless they are set already.

    glibc reads its settings only when a process starts.
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
    """The checked-out commit, and whether tracked files other than recorded results differ from it."""
    git = ["git", "-C", str(checkout)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    status = [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"]
    changed = subprocess.run(status, capture_output=True, text=True)
    return head.stdout.strip() + (" with local changes" if changed.stdout.strip() else "")


def machine(device: str) -> dict[str, Any]:
    """Hardware, versions, load, commit and command of a measurement."""
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
    """A Markdown table. `titles` and `cells`, the format of one row, are separated by ` | `."""
    parting = " | ".join("---" for _ in titles.split(" | "))
    return "\n".join(f"| {line} |" for line in (titles, parting, *(cells.format(**row) for row in rows)))


def record(name: str, result: dict[str, Any], table: str) -> None:
    """Write `results/NAME.json` and `results/NAME.md`, and print the Markdown."""
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
