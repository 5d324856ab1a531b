"""Submitted jobs as Slurm and their run folders see them: state, step, loss, time left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.cluster.records import Record

_TAIL_BYTES = 65536


@dataclass(frozen=True)
class JobView:
    """One line of `mor jobs`. `remaining` is in seconds; `steps` and `loss` are None for what does not train."""

    record: Record
    state: str
    reason: str
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    remaining: float | None = None


def view_jobs(records: list[Record]) -> list[JobView]:
    """Ask Slurm once about all jobs, and each run folder about its progress."""
    states = _slurm_states([record.job for record in records])
    return [_view(record, states) for record in records]


def _view(record: Record, states: dict[str, tuple[str, str]]) -> JobView:
    state, reason = states.get(record.job, ("", ""))
    if record.kind != "train" or record.run is None:
        return JobView(record, state or "ENDED", reason)
    status = _json(Path(record.run) / "status.json")
    last = last_training_record(Path(record.run) / "metrics.jsonl")
    steps = status.get("steps")
    step = last.get("step", status.get("step"))
    remaining = None
    if state == "RUNNING" and steps and last.get("step_seconds"):
        remaining = (steps - step) * last["step_seconds"]
    if not state:
        # Slurm forgets finished jobs after minutes; the run does not.
        state = {"finished": "COMPLETED", "running": "GONE"}.get(status.get("state", ""), "ENDED")
        reason = status.get("reason", "") or status.get("state", "")
    return JobView(record, state, reason, step, steps, last.get("lm_loss"), remaining)


def last_training_record(metrics: Path) -> dict[str, Any]:
    """The newest training record of metrics.jsonl, read from its end; empty where there is none."""
    try:
        with metrics.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - _TAIL_BYTES))
            lines = stream.read().split(b"\n")[:-1]
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record.get("kind") == "train":
            return record
    return {}


def _slurm_states(numbers: list[str]) -> dict[str, tuple[str, str]]:
    """State and reason by job number; of an array, those of its liveliest element."""
    if not numbers or not shutil.which("squeue"):
        return {}
    # One unknown number would make squeue refuse them all, so it is asked about everything of this user's.
    command = ["squeue", "--me", "--noheader", "--states=all", "--array", "--format=%F|%T|%r"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    order = ["RUNNING", "COMPLETING", "PENDING", "FAILED", "TIMEOUT", "NODE_FAIL", "COMPLETED", "CANCELLED"]
    states: dict[str, tuple[str, str]] = {}
    for line in shown.splitlines():
        number, state, reason = line.split("|", 2)
        rank = order.index(state) if state in order else len(order)
        known = states.get(number)
        if known is None or rank < (order.index(known[0]) if known[0] in order else len(order)):
            states[number] = (state, "" if reason == "None" else reason)
    return states


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
