"""The jobs that were submitted from here, also after Slurm has forgotten them: one JSON object a line."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from data_prep.errors import DataError
from data_prep.json_input import parse_json


def _usable(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a character that no path has")
    os.fsencode(text)  # raises a ValueError for lone surrogates
    return text


_Path = Annotated[str, AfterValidator(_usable)]


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
class Record:
    """One submitted job.

    Attributes:
        job: its number; name: the step's; kind: the script's; log: its file; time: when it was submitted (Unix time).
        run: run folder; recipe, overrides: what it trains, where it trains.
    """

    job: str
    name: str
    kind: str
    run: _Path | None
    log: _Path
    time: float
    recipe: _Path | None = None
    overrides: list[str] = dataclasses.field(default_factory=list)


def _records_file() -> Path:
    """MOR_JOBS names another file."""
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return Path(os.environ.get("MOR_JOBS") or folder / "mor" / "jobs.jsonl")


def remember(record: Record) -> None:
    """Add a job; raises OSError where that cannot be written."""
    file = _records_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(dataclasses.asdict(record)).encode()
    with file.open("a+b") as stream:
        # A full disk may have left half a line, which must not spoil this one.
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            line = line if stream.read(1) == b"\n" else b"\n" + line
        stream.write(line + b"\n")


def remembered(say: Callable[[str], None]) -> list[Record]:
    """All jobs, the oldest first. Damaged lines are left out, and `say` is told which is the first."""
    file = _records_file()
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        say(f"{file}: cannot be read ({error.strerror or error}); it remembers the jobs that were submitted from here.")
        return []
    records, damaged = [], []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                records.append(Record(**parse_json(line, number)))
        except (DataError, ValidationError, TypeError):
            damaged.append(number)
    if damaged:
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        say(f"{file}: line {damaged[0]}{more} is damaged and left out; remove it.")
    return records
