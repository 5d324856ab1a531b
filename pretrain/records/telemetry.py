"""A run's records: metrics.jsonl always, wandb and TensorBoard as mirrors of it, and its progress on the terminal.

Only rank 0 writes. A record is one line, written in one call and flushed, so a killed run leaves at most one
unfinished line.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Sequence
from typing import Any

import orjson

from data_prep.files import atomic_write
from data_prep.plain_text import plain
from data_prep.terminal import ProgressBars, duration
from pretrain.recipe.recipe import Recipe
from pretrain.records.mirrors import Mirrors
from pretrain.records.run_folder import RunFolder, parse_record


class Telemetry:
    """Writer of one run's records.

    Args:
        run: the run folder; recipe: what to mirror and where; steps: length of the run, for the estimate.
        active: False on every rank but 0, where all methods do nothing.
    """

    def __init__(self, run: RunFolder, recipe: Recipe, steps: int, *, active: bool) -> None:
        self._active = active
        self._run = run
        if active:
            self._name, self._steps = plain(recipe.name), steps
            self._bars = ProgressBars(keep=True)
            self._bar = self._bars.add(self._name, steps)
            run.path.mkdir(parents=True, exist_ok=True)
            self._stream = run.metrics_file.open("ab", buffering=0)
            self._unwritten = b""
            self._failing = False
            self._mirrors = Mirrors(run.path, recipe, self.say)

    def record(self, kind: str, values: dict[str, Any]) -> None:
        """Append one record and show it in the mirrors. On a failing or full disk it waits for the next one."""
        if not self._active:
            return
        record = {"kind": kind, **values}
        self._unwritten += orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n"
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
        self._mirrors.show(record)

    def event(self, event: str, step: int, **values: Any) -> None:
        """Append an event: something that happened once and is worth finding again."""
        self.record("event", {"event": event, "step": step, "time": time.time(), **values})

    def progress(self, step: int, loss: float | None, tokens_per_second: float | None, seconds_per_step: float) -> None:
        """Show how far the run is: a bar on a terminal, elsewhere a line every half minute."""
        if not self._active:
            return
        parts = [f"step {step}/{self._steps}"]
        if loss is not None:
            parts.append(f"loss {loss:.4f}" if math.isfinite(loss) else "loss not finite")
        if tokens_per_second is not None:
            parts.append(f"{tokens_per_second:,.0f} tokens/s")
        parts.append(f"{duration((self._steps - step) * seconds_per_step)} left")
        detail = " · ".join(parts)
        self._bars.update(self._bar, step, detail)
        self._bars.tell(f"{self._name}: {detail}", now=step == self._steps)

    def say(self, text: str) -> None:
        """Print a line for a person, on rank 0 only."""
        if self._active:
            self._bars.say(text)

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
            # A file system that fails here is reported when the next record is written.
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
        """Finish the mirrors and the progress display."""
        if not self._active:
            return
        self.sync()
        self._stream.close()
        self._bars.close()
        self._mirrors.close()


def rewind_metrics(run: RunFolder, step: int, unfinished: Sequence[str] = ()) -> None:
    """Drop training and evaluation records after `step`, those at `step` of evaluations that are `unfinished` there,
    and a last line that is not whole.

    A run that resumes at `step` logs what follows again; events stay, because they happened.
    """
    again = {{"validation": "validation", "suites": "evaluation"}[name] for name in unfinished}
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
