"""Clusters a person submits to, described once in `~/.config/mor/clusters.yaml`; `slurm/clusters.yaml` is one to copy.

What the command line says goes before what a profile says.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from data_prep.plain_text import plain
from pretrain.errors import LaunchError, RecipeError
from pretrain.recipe.messages import first_problem
from pretrain.recipe.yaml_input import read_yaml

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
EXAMPLE = Path(__file__).resolve().parents[2] / "slurm" / "clusters.yaml"


class Profile(BaseModel):
    """One cluster.

    Attributes:
        partition, account, qos, constraint, time, nodes, gpus_per_node, tasks_per_node: as sbatch knows them, a bare
            number as time in minutes; tasks_per_node is one for each GPU unless given.
        setup: shell lines that make `python` the right one; the environment `mor` runs in unless given.
        container: image the ranks run in. environment: further variables, such as NCCL's.
        launcher: `srun` or `deepspeed`. health: look at the nodes before training (`check`), or also leave bad ones out
            (`exclude`).
        requeue: whether a job may put itself back into the queue. chain: elements of the array that replaces it.
        options: further options of sbatch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | None = None
    nodes: int = Field(1, ge=1)
    gpus_per_node: int | None = Field(None, ge=0)
    tasks_per_node: int | None = Field(None, ge=1)
    setup: str | None = None
    container: str | None = None
    environment: dict[str, str] = {}
    launcher: Literal["srun", "deepspeed"] = "srun"
    health: Literal["none", "check", "exclude"] = "none"
    requeue: bool = True
    chain: int = Field(10, ge=1)
    options: tuple[str, ...] = Field((), strict=False)

    @field_validator("time", mode="before")
    @classmethod
    def _a_bare_number_is_minutes(cls, value: Any) -> Any:
        return str(value) if type(value) is int else value

    @field_validator("environment", mode="before")
    @classmethod
    def _variables_are_text(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name, text in value.items():
            if not isinstance(name, str) or not _VARIABLE.fullmatch(name):
                raise ValueError(f"variable {name!r} has no name that a shell takes")
            if not isinstance(text, str) and type(text) is not int:
                raise ValueError(f"variable {name} is {text!r}; write its value as text, in quotes")
        return {name: str(text) for name, text in value.items()}

    @field_validator("*")
    @classmethod
    def _no_control_characters(cls, value: Any) -> Any:
        texts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else [value]
        for text in texts:
            if isinstance(text, str) and plain(text, lines=True) != text:
                raise ValueError(f"{text!r} holds control characters")
        return value

    @property
    def ranks(self) -> int:
        """Processes of a training job."""
        return self.nodes * (self.tasks_per_node or self.gpus_per_node or 1)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    default: str | None = None
    clusters: dict[str, Profile]


def profiles_file() -> Path:
    """Where the clusters are described; MOR_CLUSTERS names another file."""
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return Path(os.environ.get("MOR_CLUSTERS") or folder / "mor" / "clusters.yaml")


def load_profile(name: str | None, **changes: Any) -> Profile:
    """The named profile, or the file's default, or an empty one where there is no file, with `changes` that are set.

    Raises:
        LaunchError: for an unreadable file, an unknown key, or a name the file does not have.
    """
    file = profiles_file()
    values: dict[str, Any] = {}
    content = _read(file)
    if content is not None:
        chosen = name if name is not None else content.default
        if chosen is not None:
            if chosen not in content.clusters:
                known = plain(", ".join(content.clusters)) or "none"
                raise LaunchError(f"{file}: no cluster '{plain(chosen)}'; it describes {known}.")
            values = content.clusters[chosen].model_dump(exclude_unset=True)
    elif name is not None:
        raise LaunchError(f"cluster '{plain(name)}': there is no {file} that could describe it; copy {EXAMPLE} there.")
    values |= {key: value for key, value in changes.items() if value is not None}
    try:
        return Profile.model_validate(values)
    except ValidationError as error:
        raise LaunchError(first_problem(error, Profile)) from None


def _read(file: Path) -> _File | None:
    try:
        values = read_yaml(file)
    except FileNotFoundError:
        return None
    except RecipeError as error:
        raise LaunchError(str(error)) from None
    try:
        return _File.model_validate({} if values is None else values)
    except ValidationError as error:
        raise LaunchError(f"{file}: {first_problem(error, _File)}") from None
