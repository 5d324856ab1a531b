"""Time per part of a step, and memory of the device or process."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch


class Stopwatch:
    """Seconds spent in the parts of a step, each without the parts inside it.

    On CUDA a part is timed by events on the default stream, which are read when the step has ended; parts on other
    streams run in parallel and are left out.

    Attributes:
        annotate: name the parts `step/NAME` in a profile that is being taken.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._paused = False
        self.annotate = False
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}
        self._taken: dict[str, float] = {}
        self._events: list[tuple[str, str | None, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what runs inside as `name`."""
        if self._paused or (self._cuda and torch.cuda.current_stream() != torch.cuda.default_stream()):
            yield
            return
        outer = self._open[-1] if self._open else None
        self._open.append(name)
        if self._cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
        else:
            began = time.perf_counter()
        try:
            if self.annotate:
                with torch.profiler.record_function(f"step/{name}"):
                    yield
            else:
                yield
        finally:
            self._open.pop()
            if self._cuda:
                end.record()
                self._events.append((name, outer, start, end))
            else:
                self._add(name, outer, time.perf_counter() - began)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is timed: it belongs to no step."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def total(self) -> dict[str, float]:
        """Seconds per part since the beginning; waits for the device to finish what was timed."""
        if self._events:
            self._events[-1][-1].synchronize()
        for name, outer, start, end in self._events:
            self._add(name, outer, start.elapsed_time(end) / 1e3)
        self._events = []
        return dict(self._seconds)

    def take(self) -> dict[str, float]:
        """Seconds per part since the last call; waits as `total` does."""
        before, self._taken = self._taken, self.total()
        return {name: seconds - before.get(name, 0.0) for name, seconds in self._taken.items()}

    def _add(self, name: str, outer: str | None, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        if outer is not None:
            self._seconds[outer] = self._seconds.get(outer, 0.0) - seconds


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: allocated on the device, or resident in this process where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # On Linux ru_maxrss survives exec: a rank would report its launcher's peak where that was larger. VmHWM does not.
    with contextlib.suppress(OSError):
        _, found, rest = Path("/proc/self/status").read_text(encoding="ascii").partition("VmHWM:")
        if found:
            return int(rest.split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_bytes(device: torch.device) -> int:
    """Memory in use: allocated on the device, or resident in this process where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss
