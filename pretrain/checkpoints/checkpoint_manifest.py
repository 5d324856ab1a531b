"""checkpoint.json: what a checkpoint is made of and where its run stood, protected by a checksum of its own.

The checksums find damage, not forgery: who can write to the folder can write them too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_prep.errors import DataError
from data_prep.files import write_json
from data_prep.json_input import parse_json
from data_prep.plain_text import plain
from pretrain.errors import RunError

MANIFEST = "checkpoint.json"
_MAXIMUM_BYTES = 1 << 28

_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True)
_Count = Annotated[int, Field(ge=0)]
_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]


@dataclass
class TrainState:
    """Where a run stands; together with DeepSpeed's state all that resuming needs.

    Attributes:
        step: finished optimiser steps; position: number of the next sample; tokens: trained on; flops: training FLOPs
            counted from measured active shares.
        skipped: ranges [first, last] of sample numbers that are left out.
        non_finite_in_row: non-finite steps up to now without a sound one between.
        recent_losses: language-model loss of the last steps, for spotting spikes.
        best_validation: lowest causal validation loss so far, and its step.
        unfinished: evaluations due after `step` that a request to stop has broken off.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")

    step: _Count = 0
    position: _Count = 0
    tokens: _Count = 0
    flops: Annotated[float, Field(ge=0)] = 0.0
    skipped: tuple[tuple[_Count, _Count], ...] = ()
    non_finite_in_row: _Count = 0
    recent_losses: tuple[float, ...] = ()
    best_validation: tuple[float, _Count] | None = None
    unfinished: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class FileFacts(BaseModel):
    """Size and checksum of one file of a checkpoint."""

    model_config = _STRICT

    bytes: _Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """A checked checkpoint.json. `files` are names within the checkpoint's folder."""

    model_config = _STRICT

    format_version: Annotated[int, Field(ge=1, le=1)]
    world_size: Annotated[int, Field(ge=1)]
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    precision: str
    optimizer: str
    state: TrainState
    files: Annotated[dict[_FileName, FileFacts], Field(min_length=1)]


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def write_manifest(folder: Path, shape: dict[str, Any], state: dict[str, Any], files: dict[str, Any]) -> None:
    """Write checkpoint.json.

    Args:
        shape: world_size, zero_stage, precision, optimizer. state: `TrainState.to_dict()`.
        files: name -> {bytes, sha256} of every file.
    """
    content = {"format_version": 1, **shape, "state": state, "files": files}
    write_json(folder / MANIFEST, {**content, "checksum": _digest(content)})


def read_manifest(checkpoint: Path) -> Manifest:
    """checkpoint.json of RUN/checkpoints/step-*.

    Raises:
        RunError: when it is missing, is no such file, was changed, or is that of another step.
        OSError: when the file system does not give it now.
    """
    file = checkpoint / MANIFEST
    try:
        with file.open("rb") as stream:
            content = parse_json(stream.read(_MAXIMUM_BYTES), file)
    except FileNotFoundError:
        raise RunError(f"{file} is missing.") from None
    except DataError as error:
        raise RunError(str(error)) from None
    if not isinstance(content, dict):
        raise RunError(f"{file}: is not a JSON object.")
    checksum = content.pop("checksum", None)
    if checksum != _digest(content):
        raise RunError(f"{file}: does not match its own checksum; it was changed after the checkpoint was written.")
    try:
        manifest = Manifest.model_validate_json(json.dumps(content))
    except ValidationError as error:
        problem = error.errors()[0]
        place = plain(".".join(str(part) for part in problem["loc"]))[:200]
        raise RunError(f"{file}: {place or 'its contents'}: {problem['msg'][:200]}.") from None
    if checkpoint_name(manifest.state.step) != checkpoint.name:
        raise RunError(f"{file}: is that of step {manifest.state.step}, not of {checkpoint.name}.")
    if any(first > last for first, last in manifest.state.skipped):
        raise RunError(f"{file}: state.skipped holds a range that ends before it begins.")
    return manifest


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
