"""How far the work is, for a person at a terminal; silent elsewhere but for what must be said."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from data_prep.piece import Progress as Step
from data_prep.plan import Plan
from data_prep.schedule import Key, Schedule
from data_prep.sources import expected_bytes

if TYPE_CHECKING:
    from rich.progress import Progress


class Display:
    """Bytes, documents, tokens a second, the time left, and what each worker is at."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._plan: Plan | None = None
        self._schedule: Schedule | None = None
        self._tokens = self._documents = self._bytes = 0
        self._began = time.monotonic()
        self._workers: dict[int, str] = {}

    def say(self, message: str) -> None:
        """Print one line for a person."""
        if self._bar is None:
            print(message, file=sys.stderr)
        else:
            self._bar.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def begin(self, plan: Plan, schedule: Schedule) -> None:
        """Show the bar (at a terminal only)."""
        self._plan, self._schedule = plan, schedule
        own = sum(schedule.share.mine(key) for key in schedule.receipts)
        if own:
            self.say(f"continuing: {own} finished piece(s) found.")
        if not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.fields[what]}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        done = sum(s.text_bytes for r in schedule.receipts.values() for shards in r.shards.values() for s in shards)
        total = sum(map(expected_bytes, plan.groups))
        self._task = self._bar.add_task("", total=max(total, done, 1), completed=done, what="starting")
        self._bar.start()

    def progress(self, worker: int, key: Key, step: Step) -> None:
        """Count a batch."""
        self._tokens += step.tokens
        self._documents += step.documents
        self._bytes += step.text_bytes
        if self._bar is None or self._plan is None:
            return
        seconds = time.monotonic() - self._began
        group = self._plan.groups[key[0]]
        self._workers[worker] = f"{worker}:{group.source}/{key[1]}"
        what = (
            f"{self._bytes / 1e6:,.0f} MB  {self._documents:,} documents  {self._tokens / seconds:,.0f} tokens/s  "
            + " ".join(text for _, text in sorted(self._workers.items())[:8])
        )
        self._bar.update(self._task, advance=step.text_bytes, what=what)

    @property
    def worked(self) -> bool:
        """Whether there was a data set to write, finished pieces included."""
        return self._plan is not None

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def summary(self) -> str:
        """What was done by this process, in one line."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        return (
            f"{self._documents:,} documents, {self._tokens:,} tokens, {self._bytes / 1e6:,.1f} MB of text "
            f"in {seconds:.1f} s ({self._bytes / 1e6 / seconds:,.1f} MB/s)"
        )
