"""Task files for lm-evaluation-harness: small ones that include the harness's own and say where the data lies."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pretrain.errors import UserError
from pretrain.evaluation.suites import Suite, skipped

_ROLES = ("training", "validation", "test", "fewshot")


def local_task_file(
    source: Path,
    splits: dict[str, Path],
    settings: dict[str, Any],
    where: dict[str, str] | None = None,
    limit: int | None = None,
) -> str:
    """Text of a task file that includes `source` and reads its splits from files, through `local_data.read_splits`.

    Args:
        source: the task file that words the questions.
        splits: file of each split by role (training, validation, test, fewshot).
        settings: entries that replace those of `source`, the task's name at least.
        where, limit: see `local_data.read_splits`.
    """
    arguments = {"splits": {role: str(file) for role, file in splits.items()}, "where": where, "limit": limit}
    text = {**_from_files(source, splits, settings), "dataset_kwargs": arguments}
    # safe_dump cannot write a tag.
    return (
        yaml.safe_dump(text, sort_keys=False) + "custom_dataset: !function pretrain.evaluation.local_data.read_splits\n"
    )


def portable_task_file(source: Path, splits: dict[str, Path]) -> str:
    """As `local_task_file`, read through the `datasets` library: what a harness without this project can run."""
    files = {role: str(file.resolve()) for role, file in splits.items()}
    text = {**_from_files(source, splits, {}), "dataset_path": "json", "dataset_kwargs": {"data_files": files}}
    return yaml.safe_dump(text, sort_keys=False)


def _from_files(source: Path, splits: dict[str, Path], settings: dict[str, Any]) -> dict[str, Any]:
    roles = {f"{role}_split": role if role in splits else None for role in _ROLES}
    return {"include": str(source), "dataset_name": None, **roles, **settings}


def task_settings(source: Path) -> dict[str, Any]:
    """Entries of a harness task file itself, without what it includes.

    Raises:
        UserError: it names no task, so it is not one of the harness version that is required.
    """
    # What stands behind this tag is the name of a function, which is not called here.
    entries = yaml.safe_load(source.read_text(encoding="utf-8").replace("!function ", ""))
    if not isinstance(entries, dict) or not isinstance(entries.get("task"), str):
        raise UserError(f"{source}: names no task; install the lm-eval that constraints.txt names.")
    return entries


@dataclass
class TaskPlan:
    """Texts of task files by task: `local` ones read `files`, `hub` ones the hub; `skipped`: tasks without data."""

    local: dict[str, str] = field(default_factory=dict)
    hub: dict[str, str] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)
    files: dict[str, list[Path]] = field(default_factory=dict)


def plan_tasks(suite: Suite, data: Path | None, hub: bool, limit: int | None = None) -> TaskPlan:
    """Where each task of a suite finds its questions.

    Args:
        data: folder with local evaluation sets; None when there is none.
        hub: a task without local files may read the hub.
        limit: see `local_data.read_splits`.
    """
    plan = TaskPlan()
    for source in suite.task_files():
        entries = task_settings(source)
        name, dataset = entries["task"], str(entries.get("dataset_name"))
        local = {role: pattern.format(dataset_name=dataset) for role, pattern in suite.local.items()}
        splits = {role: data / file for role, file in local.items()} if data else {}
        absent = [file for file in splits.values() if not file.is_file()]
        if splits and not absent:
            where = {key: pattern.format(dataset_name=dataset) for key, pattern in suite.where.items()}
            plan.files[name] = list(splits.values())
            plan.local[name] = local_task_file(source, splits, {**suite.settings, "task": name}, where, limit)
        elif hub:
            plan.hub[name] = yaml.safe_dump({"include": str(source), "task": name})
        else:
            unset = "MOR_SHARED_DATA is not set and the hub was not asked for or does not answer"
            plan.skipped.append(skipped(name, f"{absent[0]} is missing" if absent else unset))
    return plan
