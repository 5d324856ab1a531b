"""Checkpoints that were made up or changed by somebody who knows how they are written."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoints.checkpoint_manifest import TrainState, checkpoint_name, write_manifest

SHAPE = {"world_size": 1, "zero_stage": 3, "precision": "fp32", "optimizer": "adamw"}


class Payload:
    """Makes a folder when it is unpickled: what any pickle can do, and what shows that one was run."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self._marker),)


def facts_of(file: Path) -> dict[str, Any]:
    """What checkpoint.json says of a file."""
    data = file.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def fake_checkpoint(folder: Path, step: int, **state: Any) -> Path:
    """A checkpoint with one file of no use; only reading its list and its checksums means anything."""
    checkpoint = folder / checkpoint_name(step)
    checkpoint.mkdir(parents=True)
    torch.save({"weights": torch.zeros(3)}, checkpoint / "a.pt")
    whole = TrainState(step=step, position=8 * step, **state).to_dict()
    write_manifest(checkpoint, SHAPE, whole, {"a.pt": facts_of(checkpoint / "a.pt")})
    return checkpoint


def forge(checkpoint: Path, content: dict[str, Any]) -> None:
    """Write checkpoint.json with whatever content, and the checksum that belongs to it."""
    content = {name: value for name, value in content.items() if name != "checksum"}
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (checkpoint / "checkpoint.json").write_text(json.dumps({**content, "checksum": checksum}), encoding="utf-8")


def rewrite_manifest(checkpoint: Path, **state: Any) -> None:
    """Change the state in checkpoint.json, and make all its checksums right again."""
    content = json.loads((checkpoint / "checkpoint.json").read_text(encoding="utf-8"))
    files = {name: facts_of(checkpoint / name) for name in content["files"]}
    forge(checkpoint, {**content, "state": {**content["state"], **state}, "files": files})


def plant(file: Path, marker: Path) -> None:
    """Put a payload into a file of a checkpoint, whose other contents stay what they were."""
    content = torch.load(file, weights_only=False)
    torch.save({**content, "planted": Payload(marker)} if isinstance(content, dict) else Payload(marker), file)
