"""A job that is started again and again without progress is a crash loop, and stops with its history."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from data_prep.errors import DataError
from data_prep.files import write_json
from data_prep.json_input import read_json
from data_prep.plain_text import plain
from pretrain.errors import LaunchError

STARTS_WITHOUT_PROGRESS = 3
_LATEST = re.compile(r"step-(\d{1,18})\s*")
_RESULTS = ("evaluation/*.json", "evaluation/step-*/*.json", ".work/piece-*.json")
# A run, its branches, and the runs of an experiment with theirs.
_RUNS = ("", "branches/*/", "*/", "*/branches/*/")


def trained(run: Path) -> str:
    """How far a run and its branches have come: what `note_start` calls `reached`."""
    steps = [(folder.parent.name, _reached_step(folder)) for folder in sorted(run.glob("branches/*/checkpoints"))]
    branches = "".join(f", or after step {step} of branch {plain(name)}" for name, step in steps)
    return f"a checkpoint after step {_reached_step(run / 'checkpoints')}{branches}"


def _reached_step(checkpoints: Path) -> int:
    """Step of the newest checkpoint of a folder of checkpoints; 0 before the first."""
    try:
        match = _LATEST.fullmatch((checkpoints / "latest").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0
    return int(match[1]) if match else 0


def written(folders: Iterable[Path]) -> str:
    """How far evaluations, preparations and comparisons have come that write below these folders: what `note_start`
    calls `reached`. It changes whenever a checkpoint, a result or a finished piece of text is added.
    """
    patterns = [f"{place}{kind}" for place in _RUNS for kind in ("checkpoints/latest", *_RESULTS)]
    times = []
    for file in {file for folder in folders for pattern in patterns for file in folder.glob(pattern)}:
        with contextlib.suppress(OSError):  # a merge has removed it meanwhile
            times.append(file.stat().st_mtime)
    last = f", the newest of {_utc(max(times))}" if times else ""
    return f"anything new after {len(times)} checkpoints, results and finished pieces{last}"


def note_start(file: Path, what: str, reached: str, job: str, say: Callable[[str], None]) -> str | None:
    """Write this start into `file`; returns why it must not happen if it is one too many.

    Args:
        what: what is started, for the message.
        reached: how far it has come, as `trained` and `written` say it.
        job: shared by all automatic restarts of one submission; another submission counts from zero.
        say: told when the file is damaged.

    Raises:
        LaunchError: the start cannot be written down, so nothing would end a crash loop.
    """
    try:
        starts = _read(file, job)
    except DataError as error:
        say(f"{error} Starts are counted anew.")
        starts = []
    starts.append({"reached": reached, "time": _utc(time.time())})
    try:
        write_json(file, {"job": job, "starts": starts})
    except OSError as error:
        raise LaunchError(f"{file}: this start cannot be written down ({error}); make room there.") from None
    moved = (index for index, start in enumerate(reversed(starts)) if start["reached"] != reached)
    fruitless = next(moved, len(starts))
    if fruitless <= STARTS_WITHOUT_PROGRESS:
        return None
    return (
        f"{what}: started {fruitless} times without {reached} "
        f"({', '.join(start['time'] for start in starts[-fruitless:])}). "
        "Find the reason in the log above (for training also in RUN/stacks), then submit again."
    )


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _read(file: Path, job: str) -> list[dict[str, str]]:
    """The starts of this job so far.

    Raises:
        DataError: the file is not what `note_start` writes.
    """
    try:
        match read_json(file, maximum_bytes=1 << 24):
            case {"job": str(named), "starts": [*starts]} if all(map(_is_start, starts)):
                return starts if named == job else []
    except FileNotFoundError:
        return []
    raise DataError(f"{file}: is damaged: it does not hold a job and its starts.")


def _is_start(start: object) -> bool:
    match start:
        case {"reached": str(reached), "time": str(moment)}:
            return plain(reached) == reached and plain(moment) == moment
    return False
