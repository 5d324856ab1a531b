"""What a run tells: metrics.jsonl always, wandb and TensorBoard as mirrors of it, one progress line for a person.

Only rank 0 writes. A record is one line, written in one call and flushed, so a killed run leaves at most one
unfinished line.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import orjson

from data_prep.files import atomic_write
from data_prep.plain_text import plain
from pretrain.recipe.recipe import Recipe
from pretrain.records.mirrors import Mirrors
from pretrain.records.run_folder import RunFolder, parse_record

# Kind of record by evaluation (`TrainState.unfinished`).
_RECORDED_AS = {"validation": "validation", "suites": "evaluation"}


class Telemetry:
    """Writer of one run's records.

    Args:
        run: the run folder; recipe: what to mirror and where; steps: length of the run, for the estimate.
        active: False on every rank but 0, where all methods do nothing.
    """

    def __init__(self, run: RunFolder, recipe: Recipe, steps: int, *, active: bool) -> None:
        self._active = active
        self._run = run
        self._steps = steps
        self._progress = _Progress(recipe.name, steps) if active else None
        if active:
            run.path.mkdir(parents=True, exist_ok=True)
            self._stream = run.metrics_file.open("ab", buffering=0)
            self._unwritten = b""
            self._failing = False
            self._mirrors = Mirrors(run.path, recipe, self.say)

    def record(self, kind: str, values: dict[str, Any]) -> None:
        """Append one record and show it in the mirrors. On a failing or full disk it waits for the next one."""
        if not self._active:
            return
        self._unwritten += orjson.dumps({"kind": kind, **values}, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n"
        try:
            if self._failing:
                self._reopen()  # a handle from before a network file system went away stays stale
            while self._unwritten:
                self._unwritten = self._unwritten[self._stream.write(self._unwritten) :]
            self._failing = False
        except OSError as error:
            if not self._failing:
                self.say(f"{self._run.metrics_file}: {error}; records wait in memory until it can be written again.")
            self._failing = True
        self._mirrors.show(kind, values)

    def event(self, event: str, step: int, **values: Any) -> None:
        """Append an event: something that happened once and is worth finding again."""
        self.record("event", {"event": event, "step": step, "time": time.time(), **values})

    def progress(self, step: int, loss: float | None, tokens_per_second: float | None, seconds_per_step: float) -> None:
        """Update the progress line."""
        if self._progress is not None:
            self._progress.update(step, loss, tokens_per_second, seconds_per_step)

    def say(self, text: str) -> None:
        """Print a line for a person, on rank 0 only."""
        if self._progress is not None:
            self._progress.say(text)

    def rewind(self, step: int) -> None:
        """Drop the records after `step`, because the run went back there."""
        if not self._active:
            return
        waiting = ((line, parse_record(line)) for line in self._unwritten.splitlines(keepends=True))
        self._unwritten = b"".join(line for line, record in waiting if record and not _is_undone(record, step, set()))
        try:
            rewind_metrics(self._run, step)
            self._reopen()
        except OSError as error:
            self.say(f"{self._run.metrics_file}: {error}; it still holds the steps after {step}.")
        self._mirrors.rewind()

    def sync(self) -> None:
        """Make everything recorded so far survive a power cut; called when a checkpoint is complete."""
        if self._active:
            # A file system that fails here has its say when the next record is written.
            with contextlib.suppress(OSError):
                if not os.path.exists(self._run.metrics_file):
                    self._reopen()  # removed or moved: what follows must not go where nobody finds it
                os.fsync(self._stream.fileno())
            self._mirrors.flush()

    def _reopen(self) -> None:
        before, self._stream = self._stream, self._run.metrics_file.open("ab", buffering=0)
        with contextlib.suppress(OSError):
            before.close()

    def close(self) -> None:
        """Finish the mirrors and the progress line."""
        if not self._active:
            return
        self.sync()
        self._stream.close()
        if self._progress is not None:
            self._progress.close()
        self._mirrors.close()


def rewind_metrics(run: RunFolder, step: int, unfinished: Sequence[str] = ()) -> None:
    """Drop training and evaluation records after `step`, those at `step` of evaluations that are `unfinished` there,
    and a last line that is not whole.

    A run that resumes at `step` logs what follows again; events stay, because they happened.
    """
    again = {_RECORDED_AS[name] for name in unfinished}
    if not run.metrics_file.is_file():
        return
    kept = []
    changed = False
    for line in run.metrics_file.read_bytes().splitlines(keepends=True):
        record = parse_record(line)
        if record is None or _is_undone(record, step, again):
            changed = True
        else:
            kept.append(line)
    if changed:
        with atomic_write(run.metrics_file) as stream:
            stream.writelines(kept)


def _is_undone(record: dict[str, Any], step: int, again: set[str]) -> bool:
    kind, at = record["kind"], record["step"]
    return kind != "event" and (at > step or (at == step and kind in again))


class _Progress:
    """One rich line on a terminal; elsewhere a plain line now and then. A terminal that is gone, or a log whose disk is
    full, loses lines and ends nothing.
    """

    _PLAIN_SECONDS = 30.0

    def __init__(self, name: str, steps: int) -> None:
        self._name = plain(name)
        self._steps = steps
        self._printed = 0.0
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[detail]}", markup=False),
                console=Console(stderr=True),
                transient=False,
            )
            self._task = self._bar.add_task(self._name, total=steps, detail="")
            self._bar.start()

    def update(self, step: int, loss: float | None, tokens_per_second: float | None, seconds_per_step: float) -> None:
        parts = []
        if loss is not None:
            parts.append(f"loss {loss:.4f}" if math.isfinite(loss) else "loss not finite")
        if tokens_per_second is not None:
            parts.append(f"{tokens_per_second:,.0f} tokens/s")
        parts.append(f"{format_seconds((self._steps - step) * seconds_per_step)} left")
        detail = " · ".join(parts)
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.update(self._task, completed=step, detail=detail)
        elif time.monotonic() - self._printed >= self._PLAIN_SECONDS or step == self._steps:
            self._printed = time.monotonic()
            self.say(f"{self._name}: step {step}/{self._steps} · {detail}")

    def say(self, text: str) -> None:
        text = plain(text, lines=True)
        with contextlib.suppress(OSError):
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False)
            else:
                print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()


def format_seconds(seconds: float) -> str:
    """Whole units that a person reads at a glance: `3 d 4 h`, `2 h 05 min`, `12 min`, `40 s`."""
    seconds = max(0.0, seconds)
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 90:
        return f"{minutes:.0f} min"
    hours, rest = divmod(round(minutes), 60)
    return f"{hours} h {rest:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
