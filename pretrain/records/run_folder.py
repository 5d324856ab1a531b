"""A run is a folder: everything downstream (evaluation, comparison, `mor runs`) reads these files and nothing else.

recipe.yaml       the resolved recipe, complete
model.json        the network's configuration
environment.json  versions, commit, host, device, world size, launcher
plan.json         steps, tokens and FLOPs as planned
metrics.jsonl     one JSON object a line, told apart by "kind": train, validation, evaluation, event
checkpoints/      step-00000100/ ... and latest
weights/          final weights in plain torch (model.safetensors, model.json)
tokenizer/        the tokenizer the run was trained with
evaluation/       <suite>.json of the final weights; step-00000100/<suite>.json of suites during training
profile/          traces and tables of profiled steps
status.json       running, finished, stopped or failed, and at which step
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from data_prep.errors import DataError
from data_prep.files import write_json, write_text
from data_prep.json_input import read_json
from pretrain.errors import RunError
from pretrain.records.fields import Fields, is_count


def require_writable(folder: Path) -> None:
    """Make `folder` if it is missing, and try to write a file there, before work whose result goes there.

    Raises:
        RunError: the folder or the file cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(bytes(4096))
    except OSError as error:
        reason = error.strerror or error
        raise RunError(
            f"{folder}: cannot be written ({reason}), so nothing was computed or submitted; make room, or use another "
            "folder."
        ) from None


class RunFolder:
    """Paths of one run and checked, atomic access to its files.

    Raises (all methods that read):
        RunError: when a file is missing or damaged; the message names the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.recipe_file = self.path / "recipe.yaml"
        self.model_file = self.path / "model.json"
        self.environment_file = self.path / "environment.json"
        self.plan_file = self.path / "plan.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.status_file = self.path / "status.json"
        self.checkpoints = self.path / "checkpoints"
        self.weights = self.path / "weights"
        self.tokenizer = self.path / "tokenizer"
        self.evaluation = self.path / "evaluation"

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @classmethod
    def existing(cls, path: str | os.PathLike[str]) -> RunFolder:
        """The run at `path`, which must be one."""
        run = cls(path)
        if not run.recipe_file.is_file():
            problem = "not a run folder (no recipe.yaml)" if run.path.is_dir() else "no such run folder"
            raise RunError(f"{path}: {problem}; give the one that `mor train` wrote.")
        return run

    def read_json(self, file: Path) -> Any:
        """The value in one of this folder's JSON files."""
        try:
            return read_json(file)
        except FileNotFoundError:
            raise RunError(f"{file}: missing; the run has not come that far, or was copied without it.") from None
        except DataError as error:
            raise RunError(f"{error} Restore it or start the run in a new folder.") from None

    def _object(self, file: Path, *, texts: str = "", counts: str = "", objects: str = "") -> dict[str, Any]:
        """The JSON object in a file, of which the named keys, if they are there, have the right types."""
        values = self.read_json(file)
        try:
            fields = Fields(values, file)
            for name in texts.split():
                fields.text(name, None)
            for name in counts.split():
                fields.count(name, None)
            for name in objects.split():
                fields.object(name)
        except RunError as error:
            raise RunError(f"{error} Restore it or start the run in a new folder.") from None
        return fields.values

    def write_json(self, file: Path, value: Any) -> None:
        write_json(file, value)

    def write_text(self, file: Path, text: str) -> None:
        write_text(file, text)

    def plan(self) -> dict[str, Any]:
        return self._object(self.plan_file, counts="steps", texts="tokenizer_fingerprint data_manifest")

    def model(self) -> dict[str, Any]:
        return self._object(self.model_file)

    def environment(self) -> dict[str, Any]:
        return self._object(
            self.environment_file, counts="world_size", texts="device launcher code", objects="versions"
        )

    def status(self) -> dict[str, Any]:
        """The run's state; `{"state": "absent"}` before it has begun."""
        if not self.status_file.is_file():
            return {"state": "absent"}
        status = self._object(self.status_file, counts="step steps", texts="state reason")
        if "state" not in status:
            raise RunError(f"{self.status_file}: state is missing. Remove the file, and start the run again.")
        return status

    def metrics(self, kind: str | None = None) -> Iterator[dict[str, Any]]:
        """Lines of metrics.jsonl in order, of one kind or all.

        A last line without a newline is left out: a killed process did not finish it.
        """
        if not self.metrics_file.is_file():
            raise RunError(f"{self.metrics_file}: missing; the run has not logged a step yet.")
        try:
            stream = self.metrics_file.open("rb")
        except OSError as error:
            raise RunError(f"{self.metrics_file}: cannot be read: {error.strerror or error}.") from None
        with stream:
            for number, line in enumerate(stream, 1):
                if not line.endswith(b"\n"):
                    return
                record = parse_record(line)
                if record is None:
                    raise RunError(
                        f"{self.metrics_file}:{number}: not a JSON object with a kind and a step; the file is damaged "
                        "at this line."
                    )
                if kind is None or record["kind"] == kind:
                    yield record


def parse_record(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None for one that is damaged or not whole.

    A record has at least a `kind` and a `step`. A number that is not finite is None, because JSON cannot hold it.
    """
    if not line.endswith(b"\n"):
        return None
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    whole = isinstance(record, dict) and isinstance(record.get("kind"), str) and is_count(record.get("step"))
    return record if whole else None
