"""What was submitted from here, remembered after Slurm has forgotten it: one JSON object a line."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Record:
    """One submitted job: its number, the step's name and script, run folder, log file, and when (Unix time)."""

    job: str
    name: str
    kind: str
    run: str | None
    log: str
    time: float


def records_file() -> Path:
    """Where submitted jobs are remembered; MOR_JOBS names another file."""
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return Path(os.environ.get("MOR_JOBS") or folder / "mor" / "jobs.jsonl")


def remember(record: Record) -> None:
    """Add a job."""
    file = records_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(dataclasses.asdict(record)) + "\n")


def remembered() -> list[Record]:
    """All jobs, the oldest first; lines that are no records are left out."""
    try:
        lines = records_file().read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    records = []
    for line in lines:
        try:
            records.append(Record(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return records
