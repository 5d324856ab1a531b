"""`mor train RECIPE --profile 5-7`: time and memory of chosen steps.

RUN/profile/steps-5-7/ then holds, for every rank, `rank-00000.trace.json.gz` (for chrome://tracing or
ui.perfetto.dev) and on CUDA `rank-00000.memory.pickle` (for pytorch.org/memory_viz), and from rank 0 `table.txt`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from data_prep.files import write_text
from pretrain.errors import LaunchError
from pretrain.records.stopwatch import Stopwatch


def parse_steps(text: str) -> tuple[int, int]:
    """First and last step of `5-7` or `5`, counted from 1 as metrics.jsonl counts.

    Raises:
        LaunchError: when it is neither.
    """
    first, dash, last = text.partition("-")
    try:
        steps = int(first), int(last if dash else first)
    except ValueError:
        steps = (0, 0)
    if not 1 <= steps[0] <= steps[1]:
        raise LaunchError(f"--profile {text}: give a step or a range of steps, counted from 1, such as 5-7.")
    return steps


class StepProfiler:
    """Profiles the steps `first` to `last` of a run; a profiled step is slower than the others.

    Args:
        folder: RUN/profile.
        steps: first and last, counted from 1.
        rank: of this process; every rank writes its own trace.
        stopwatch: that of the loop, for the parts of a step.
    """

    def __init__(
        self, folder: Path, steps: tuple[int, int], *, device: torch.device, rank: int, stopwatch: Stopwatch
    ) -> None:
        self.first, self.last = steps
        name = f"steps-{self.first}-{self.last}" if self.last > self.first else f"step-{self.first}"
        self.folder = folder / name
        self._cuda = device.type == "cuda"
        self._rank = rank
        self._stopwatch = stopwatch
        self._profile: profile | None = None
        self._began = 0.0
        self._parts: dict[str, float] = {}

    def check(self, begin: int, end: int) -> None:
        """Check that this start takes the profiled steps; it takes those after `begin`, up to `end`.

        Raises:
            LaunchError: it does not take all of them.
        """
        if not begin < self.first <= self.last <= end:
            raise LaunchError(
                f"--profile: steps {self.first} to {self.last} are not all ahead; this start takes the steps "
                f"{begin + 1} to {end}."
            )

    def before(self, step: int) -> None:
        """Call at the beginning of every step; starts the profile at its first one."""
        if step != self.first:
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        if self._cuda:
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)
            torch.cuda.synchronize()
        self._stopwatch.annotate = True
        self._parts = self._stopwatch.total()
        self._profile = profile(activities=activities, profile_memory=True)
        self._profile.start()
        self._began = time.perf_counter()

    def after(self, step: int) -> str | None:
        """Call at the end of every step; after the last one, write the files and return the table."""
        if step != self.last or self._profile is None:
            return None
        if self._cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        finished, self._profile = self._profile, None
        finished.stop()
        self._stopwatch.annotate = False
        parts = {name: value - self._parts.get(name, 0.0) for name, value in self._stopwatch.total().items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"rank-{self._rank:05d}"
        finished.export_chrome_trace(str(self.folder / f"{name}.trace.json.gz"))
        if self._cuda:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"{name}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        table = self._table(seconds, parts, finished.key_averages())
        if self._rank == 0:
            write_text(self.folder / "table.txt", table + "\n")
        return table

    def _table(self, seconds: float, parts: dict[str, float], operations: Any) -> str:
        count = self.last - self.first + 1
        lines = [f"Steps {self.first} to {self.last} on rank {self._rank}: {seconds / count:.4f} s a step.", ""]
        rest = seconds - sum(parts.values())
        lines.append(f"{'part of a step':<48}{'ms':>10}{'share':>8}")
        for name, value in sorted({**parts, "everything else": rest}.items(), key=lambda item: -item[1]):
            lines.append(f"{name:<48}{1e3 * value / count:>10.2f}{value / seconds:>8.1%}")
        where = "device" if self._cuda else "cpu"
        own, held = f"self_{where}_time_total", f"self_{where}_memory_usage"
        annotations = {f"step/{name}" for name in parts}
        rows = [row for row in operations if row.key not in annotations and getattr(row, own) > 0]
        rows.sort(key=lambda row: -getattr(row, own))
        total = sum(getattr(row, own) for row in rows) or 1.0
        heading = f"operation ({where}, its own time)"
        lines += ["", f"{heading:<48}{'ms':>10}{'share':>8}{'calls':>8}{'MiB net':>10}"]
        for row in rows[:20]:
            lines.append(
                f"{row.key[:47]:<48}{getattr(row, own) / 1e3 / count:>10.2f}{getattr(row, own) / total:>8.1%}"
                f"{row.count / count:>8.0f}{getattr(row, held) / 2**20 / count:>10.1f}"
            )
        return "\n".join([*lines, "", f"Traces: {self.folder}"])
