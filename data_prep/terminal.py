"""Progress for a person: bars on a terminal, a plain line now and then elsewhere; and the wording of durations."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from types import TracebackType
from typing import Any

from data_prep.plain_text import plain


def duration(seconds: float) -> str:
    """Whole units that a person reads at a glance: `40 s`, `12 min`, `2 h 05 min`, `3 d 4 h`; `-` for no number."""
    if not math.isfinite(seconds):
        return "-"
    seconds = max(0.0, seconds)
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


class ProgressBars:
    """Progress bars with a detail after each, on standard error.

    Without a terminal there are no bars, and `tell` prints a line every `every` seconds instead. Lines that cannot be
    written (a closed terminal, a full disk) are lost without an error.

    Args:
        every: seconds between two lines where there is no terminal.
        keep: whether the bars stay on the screen when all is done.
        bars: False for neither bars nor lines, except those of `say`.
    """

    def __init__(self, *, every: float = 30.0, keep: bool = False, bars: bool = True) -> None:
        self._every, self._wanted = every, bars
        self._told = -math.inf
        self._bars: Any = None
        if bars and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=30),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}", markup=False),
                console=Console(stderr=True),
                transient=not keep,
            )
            self._bars.start()

    @property
    def on_terminal(self) -> bool:
        """Whether there are bars."""
        return self._bars is not None

    def add(self, name: str, total: float | None) -> int:
        """Add a bar for `total` units of work (None: not known yet) and return its number."""
        return self._bars.add_task(plain(name), total=total, detail="") if self._bars is not None else 0

    def update(self, bar: int, done: float, detail: str = "", **changes: Any) -> None:
        """Move a bar to `done`; `changes` are rich's (`total`, `visible`, `description`)."""
        if self._bars is not None:
            if "description" in changes:
                changes["description"] = plain(changes["description"])
            with contextlib.suppress(OSError):
                self._bars.update(bar, completed=done, detail=plain(detail), **changes)

    def tell(self, text: str, *, now: bool = False) -> None:
        """Where there are no bars: print `text` if the last line is `every` seconds old, or `now`."""
        if self._wanted and self._bars is None and (now or time.monotonic() - self._told >= self._every):
            self._told = time.monotonic()
            self.say(text)

    def say(self, text: object) -> None:
        """Print lines that stay, above the bars."""
        shown = plain(text, lines=True)
        with contextlib.suppress(OSError):
            if self._bars is not None:
                self._bars.console.print(shown, markup=False, highlight=False, soft_wrap=True)
            else:
                print(shown, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Remove the bars, or leave them where `keep` says so."""
        if self._bars is not None:
            with contextlib.suppress(OSError):
                self._bars.stop()
            self._bars = None

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
