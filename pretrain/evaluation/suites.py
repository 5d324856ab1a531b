"""Which suites there are, and where each finds its data on this machine.

`perplexity`, `own` and `routing` need only the run's held-out text. The published benchmarks are rows of
tasks/benchmarks.yaml: their questions come from files below $MOR_SHARED_DATA/eval, or from the hub if it is allowed and
answers.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pretrain.errors import RecipeError, UserError
from pretrain.evaluation.settings import HELD_OUT_SUITES
from pretrain.recipe.messages import first_problem, nearest, shorten
from pretrain.recipe.yaml_input import read_yaml

TASKS = Path(__file__).parent / "tasks"


class Suite(BaseModel):
    """A row of benchmarks.yaml, where each field is explained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    tasks: tuple[str, ...]
    local: dict[str, str]
    metric: str
    chance: float | None = None
    where: dict[str, str] = {}
    settings: dict[str, Any] = {}
    fewshot: int = Field(default=0, ge=0)

    def task_files(self) -> list[Path]:
        """The harness's task files of this suite; a leading underscore marks groups and templates."""
        root = harness_tasks()
        files = sorted({file for pattern in self.tasks for file in root.glob(pattern) if not file.name.startswith("_")})
        if not files:
            raise UserError(
                f"{self.name}: the installed lm-eval has no {' or '.join(self.tasks)} below {root}; "
                "install the version that constraints.txt names."
            )
        return files


def harness_tasks() -> Path:
    """lm-evaluation-harness's folder of task files, found without importing it."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise UserError(
            "lm-eval is not installed, and few-shot suites need it; `pip install -c constraints.txt -e .` brings it."
        )
    return Path(spec.origin).parent / "tasks"


@functools.cache
def benchmarks() -> dict[str, Suite]:
    """Every published benchmark by its suite's name.

    Raises:
        RecipeError: benchmarks.yaml is not what its head says.
    """
    file = TASKS / "benchmarks.yaml"
    table = read_yaml(file)
    if not isinstance(table, dict):
        raise RecipeError(f"{file}: benchmarks are a mapping from a suite's name to its row.")
    rows = {}
    for name, row in table.items():
        try:
            rows[name] = Suite.model_validate({"name": name, **row} if isinstance(row, dict) else row)
        except ValidationError as error:
            problem = first_problem(error, Suite)
            raise RecipeError(f"{file}: {name}: {problem} The head of the file says what a row holds.") from None
    return rows


def check_suites(names: Iterable[str]) -> list[str]:
    """`names` without repetitions; `all` stands for every suite.

    Raises:
        UserError: for an unknown suite, naming the nearest known one.
    """
    known = [*HELD_OUT_SUITES, *benchmarks()]
    chosen: dict[str, None] = {}
    for name in names:
        if name == "all":
            chosen.update(dict.fromkeys(known))
        elif name in known:
            chosen[name] = None
        else:
            raise UserError(f"evaluation suite {shorten(name)} is unknown; {nearest(name, known)}")
    return list(chosen)


def shared_evaluation_data() -> Path | None:
    """$MOR_SHARED_DATA/eval, or None where the variable is not set.

    Raises:
        UserError: when the variable names a folder without eval/.
    """
    folder = os.environ.get("MOR_SHARED_DATA")
    if not folder:
        return None
    data = Path(folder) / "eval"
    if not data.is_dir():
        raise UserError(
            f"MOR_SHARED_DATA={folder} has no folder eval/ with evaluation sets; correct the variable or unset it."
        )
    return data


@functools.cache
def hub_answers() -> bool:
    """Whether the Hugging Face hub may be used and accepts a connection within two seconds.

    HF_HUB_OFFLINE, HF_DATASETS_OFFLINE and HF_ENDPOINT count. The libraries themselves would try for minutes.
    """
    from datasets import config

    if config.HF_HUB_OFFLINE:
        return False
    address = urlsplit(config.HF_ENDPOINT)
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        with socket.create_connection((address.hostname or "", port), timeout=2.0):
            return True
    except (OSError, ValueError):
        return False


def skipped(task: str, why: str) -> dict[str, str]:
    """An entry of a result's `skipped` list for a task whose data is out of reach."""
    return {
        "task": task,
        "why": why,
        "how": "set MOR_SHARED_DATA to a folder with eval/, or allow the hub where it answers (mor eval RUN --hub).",
    }
