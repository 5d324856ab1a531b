"""A job that is started again and again without getting anywhere is a crash loop, and stops with its history."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

from data_prep.files import write_json

STARTS_WITHOUT_PROGRESS = 3
_LATEST = re.compile(r"step-(\d+)")


def reached_step(run: Path) -> int:
    """Step of the newest checkpoint of a run folder; 0 before the first."""
    try:
        match = _LATEST.match((run / "checkpoints" / "latest").read_text(encoding="utf-8"))
    except OSError:
        return 0
    return int(match[1]) if match else 0


def note_start(run: Path, job: str, cause: str) -> str | None:
    """Write this start into a hidden file beside the run; says why it must not happen if it is one too many.

    Beside it, because a crash may come before there is a run folder at all.

    Args:
        run: run folder.
        job: what all automatic restarts of one submission share; a new one, by a person's hand, counts from zero.
        cause: why the job is started now, for the history.
    """
    file = run.parent / f".{run.name}.restarts.json"
    step = reached_step(run)
    starts = _read(file, job)
    starts.append({"step": step, "cause": cause, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
    write_json(file, {"job": job, "starts": starts})
    moved = (index for index, start in enumerate(reversed(starts)) if start["step"] != step)
    fruitless = next(moved, len(starts))
    if fruitless <= STARTS_WITHOUT_PROGRESS:
        return None
    history = "; ".join(f"{start['time']} {start['cause']}" for start in starts[-fruitless:])
    return (
        f"{run}: started {fruitless} times without a checkpoint after step {step} ({history}). "
        "Find the reason in the log above and in RUN/stacks, then submit again."
    )


def _read(file: Path, job: str) -> list[dict[str, Any]]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return record["starts"] if record.get("job") == job else []
