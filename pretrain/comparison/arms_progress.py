"""Progress of an experiment: the current run and the time left, read from the runs' metrics files."""

from __future__ import annotations

import os
import time

from data_prep.plain_text import plain
from data_prep.terminal import ProgressBars, duration
from pretrain.comparison import numbers
from pretrain.comparison.planned_runs import PlannedRun
from pretrain.errors import RunError
from pretrain.records.fields import Fields
from pretrain.records.run_folder import RunFolder, parse_record

_TAIL_BYTES = 1 << 17  # more than any record takes


class ArmsProgress:
    """Progress of several runs, each weighted by the FLOPs that are trained for it.

    Args:
        runs: in the order in which they are trained.
        bars: where progress is shown.
    """

    def __init__(self, runs: list[PlannedRun], bars: ProgressBars) -> None:
        self._runs, self._bars = runs, bars
        self._bar: int | None = None
        self._run: PlannedRun | None = None
        self._started = time.monotonic()
        # FLOPs of the runs that have ended; of the current run so far; and how many of both were spent before this
        # process started, or are a branch's share of its trunk.
        self._ended = self._current = self._not_ours = 0.0

    def follow(self, run: PlannedRun) -> None:
        """Show the progress of `run`, the current one."""
        steps = run.plan.steps
        if run is not self._run:
            self._run = run
            self._show(run, steps, 0, "starting")
            self._bars.tell(self._title(run), now=True)
        record = _latest(RunFolder(run.trial.folder))
        if record is None:
            return
        step = record.values["step"]
        spent = min(1.0, step / steps) * run.new_flops
        if not self._current:
            self._not_ours += spent
        self._current = spent
        detail = " · ".join(part for part in (_detail(record), self._remaining()) if part)
        self._show(run, steps, step, detail)
        self._bars.tell(f"{run.trial.name}: step {step} of {steps} · {detail}")

    def end(self, run: PlannedRun) -> None:
        """Count `run` as trained, now or before."""
        if run is not self._run or not self._current:
            self._not_ours += run.new_flops
        self._ended += run.new_flops
        self._current = 0.0

    def activity(self, run: PlannedRun, text: str) -> None:
        """Show what happens to `run` apart from training."""
        self._show(run, 1, 1, text)
        self._bars.tell(f"{run.trial.name}: {text}", now=True)

    def say(self, text: str) -> None:
        """Print lines that stay."""
        self._bars.say(text)

    def _title(self, run: PlannedRun) -> str:
        return f"{self._runs.index(run) + 1}/{len(self._runs)} {run.trial.name}"

    def _show(self, run: PlannedRun, total: int, done: int, detail: str) -> None:
        if self._bar is None:
            self._bar = self._bars.add("", total)
        self._bars.update(self._bar, done, detail, total=total, description=self._title(run))

    def _remaining(self) -> str:
        """The time left for the whole experiment, from this process's own speed."""
        spent = self._ended + self._current
        ours = spent - self._not_ours
        if ours <= 0:
            return ""
        rest = sum(run.new_flops for run in self._runs) - spent
        return f"experiment: about {duration((time.monotonic() - self._started) * rest / ours)} left"


def _latest(run: RunFolder) -> Fields | None:
    """The newest complete training record; None where there is none yet."""
    try:
        with run.metrics_file.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - _TAIL_BYTES))
            lines = stream.read().splitlines(keepends=True)
    except OSError:
        return None
    records = (parse_record(line) for line in reversed(lines))
    newest = next((record for record in records if record is not None and record["kind"] == "train"), None)
    return None if newest is None else Fields(newest, run.metrics_file)


def _detail(record: Fields) -> str:
    """Loss and speed. Where the record does not have them the report complains, and training goes on."""
    try:
        loss = record.number("lm_loss", None) if "lm_loss" in record.values else record.number("loss", None)
        return f"loss {numbers.fixed(loss)} · {numbers.whole(record.amount('tokens_per_second', None))} tokens/s"
    except RunError as error:
        return plain(error)
