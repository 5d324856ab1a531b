"""Versions, code and machine of a run: kept beside its results, and compared between ranks at the start."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import socket
import subprocess
from pathlib import Path
from typing import Any

import torch

from data_prep.plain_text import plain
from pretrain.errors import RunError
from pretrain.ranks.environment import Ranks
from pretrain.recipe.deepspeed_json import offload_device, zero_stage
from pretrain.recipe.recipe import Recipe
from pretrain.records.finished import flatten
from pretrain.records.run_folder import RunFolder


def describe_environment(
    recipe: Recipe, ds_config: dict[str, Any], ranks: Ranks, device: torch.device
) -> dict[str, Any]:
    """What environment.json holds."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "versions": _versions(),
        "commit": git_commit(),
        "code": source_digest(),
        "host": socket.gethostname(),
        "device": name,
        "device_type": device.type,
        "world_size": ranks.world_size,
        "launcher": ranks.launcher,
        "zero_stage": zero_stage(ds_config),
        "offload_optimizer": offload_device(ds_config, "offload_optimizer"),
        "precision": recipe.precision,
        "ds_config": ds_config,
    }


def changes_since_last_start(folder: RunFolder, now: dict[str, Any]) -> list[str]:
    """A warning if the last start had other code, versions or another device than `now` (from `describe_environment`).

    Call it before environment.json is written again.
    """
    try:
        before = folder.environment()
    except RunError:
        return []
    versions = before.get("versions") or {}
    changes = [
        f"{name} was {versions[name]} and is {version}"
        for name, version in now["versions"].items()
        if versions.get(name, version) != version
    ]
    if before.get("device", now["device"]) != now["device"]:
        changes.append(f"the device was {before['device']} and is {now['device']}")
    if before.get("code", now["code"]) != now["code"]:
        changes.append(f"the code was that of commit {before.get('commit')} and is that of {now['commit']}")
    if not changes:
        return []
    changes = [plain(change)[:200] for change in changes]
    return [f"Since the last start {'; '.join(changes)}. Losses may differ from those of an undisturbed run."]


def _versions() -> dict[str, str]:
    packages = ("mor-pretrain", "torch", "deepspeed", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def git_commit() -> str | None:
    """Commit of the code that is running, with `+changes` where files differ from it; None outside a repository."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def identity(recipe: Recipe, ds_config: dict[str, Any], data: str, tokenizer: str) -> dict[str, str]:
    """What must be the same on all ranks, by the name that messages use; `data` and `tokenizer` are fingerprints."""
    dump = recipe.model_dump(mode="json")
    return {
        "recipe": hashlib.sha256(repr(sorted(flatten(dump).items())).encode()).hexdigest()[:16],
        "seed": str(recipe.seed),
        "DeepSpeed configuration": hashlib.sha256(repr(ds_config).encode()).hexdigest()[:16],
        "data": data[:16],
        "tokenizer": tokenizer[:16],
        "code": source_digest(),
        **{f"version of {name}": version for name, version in _versions().items()},
    }


def source_digest() -> str:
    """Hash of the source files that decide what a run computes."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for package in ("mor_model", "data_prep", "pretrain"):
        for file in sorted((root / package).rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
