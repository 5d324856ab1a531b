"""What Slurm and the run folders say about submitted jobs: state, step, loss, time left."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mor_model.errors import ConfigError
from pretrain.cluster.job_records import Record
from pretrain.errors import RunError, UserError
from pretrain.recipe.recipe import Recipe, load_recipe
from pretrain.records.fields import Fields
from pretrain.records.finished import Part, begun_with, parts
from pretrain.records.run_folder import RunFolder, parse_record

_TAIL_BYTES = 65536
# The state of an array is the last of these that one of its elements has.
_STATES = ["CANCELLED", "COMPLETED", "NODE_FAIL", "TIMEOUT", "FAILED", "PENDING", "COMPLETING", "RUNNING"]


@dataclass(frozen=True)
class JobView:
    """One line of `mor jobs`.

    Attributes:
        step, steps, loss: of the part of the run that is trained now, None for jobs that do not train; a loss that is
            not finite is nan. branch: the name of that part, None for the trunk.
        remaining: seconds until the run and all its branches are finished.
    """

    record: Record
    state: str
    reason: str
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    remaining: float | None = None
    branch: str | None = None


def view_jobs(records: list[Record]) -> list[JobView]:
    """Ask Slurm once about all jobs, and each run folder about its progress."""
    states = _slurm_states([record.job for record in records])
    return [_view(record, states) for record in records]


def _view(record: Record, states: dict[str, tuple[str, str]]) -> JobView:
    state, reason = states.get(record.job, ("", ""))
    if record.kind != "train" or record.run is None:
        return JobView(record, state or "ENDED", reason)
    try:
        everything = parts(_recipe(record, record.run))
        left = [part for part in everything if not part.finished]
        current = left[0] if left else everything[0]
        status = current.folder.status()
        progress = [_progress(part) for part in everything]
    except (UserError, ConfigError, OSError) as error:
        return JobView(record, state or "ENDED", reason or str(error))
    step, loss, seconds = progress[everything.index(current)]
    seconds = seconds or progress[0][2]
    remaining = None
    if state == "RUNNING" and seconds:
        remaining = seconds * sum(part.steps - done for part, (done, *_) in zip(everything, progress) if part in left)
    if not state:
        # Slurm forgets finished jobs after minutes; the run folder does not.
        state = "COMPLETED" if not left else "GONE" if status["state"] == "running" else "ENDED"
        reason = "" if not left else status.get("reason") or status["state"]
    return JobView(record, state, reason, step, current.steps, loss, remaining, current.name)


def _recipe(record: Record, run: str) -> Recipe:
    """What the job was submitted to train; if that file is gone, not written yet, or describes another run by now, what
    the run was begun with.
    """
    if record.recipe is not None and Path(record.recipe).is_file():
        recipe = load_recipe(record.recipe, record.overrides).model_copy(update={"run_dir": run})
        with contextlib.suppress(RunError):
            begun_with(recipe)
            return recipe
    return load_recipe(RunFolder(run).recipe_file).model_copy(update={"run_dir": run})


def _progress(part: Part) -> tuple[int, float | None, float | None]:
    """Steps that are trained, loss (nan: not finite) and seconds per step; None if unknown."""
    status = part.folder.status()
    if status["state"] == "absent":
        # A branch's folder begins with the trunk's records, which may go beyond the step where the branch leaves.
        return part.start, None, None
    last = Fields(_last_training_record(part.folder.metrics_file), part.folder.metrics_file)
    step = last.values.get("step", status.get("step", part.start))
    return min(step, part.steps), last.number("lm_loss", None), last.amount("step_seconds", None)


def _last_training_record(metrics: Path) -> dict[str, Any]:
    """The newest training record of metrics.jsonl, read from its end; empty if there is none."""
    try:
        with metrics.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - _TAIL_BYTES))
            records = map(parse_record, reversed(stream.readlines()))
    except OSError:
        return {}
    return next((record for record in records if record is not None and record["kind"] == "train"), {})


def _slurm_states(numbers: list[str]) -> dict[str, tuple[str, str]]:
    """State and reason by job number."""
    if not numbers or not shutil.which("squeue"):
        return {}
    # squeue refuses a list with one unknown number, so it is asked about all jobs of this user.
    command = ["squeue", "--me", "--noheader", "--states=all", "--array", "--format=%F|%T|%r"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    rows = [line.split("|", 2) for line in shown.splitlines() if line.count("|") >= 2]
    rows.sort(key=lambda row: _STATES.index(row[1]) if row[1] in _STATES else -1)
    return {number: (state, "" if reason == "None" else reason) for number, state, reason in rows}
