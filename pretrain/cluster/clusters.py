"""Clusters to submit to, described once in `~/.config/mor/clusters.yaml`; `slurm/clusters.yaml` is one to copy.

The command line takes precedence over the file.
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

DEFAULT = "default"
EXAMPLE = Path(__file__).resolve().parents[2] / "slurm" / "clusters.yaml"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TIME = re.compile(r"(?:[0-9]{1,9}-)?[0-9]{1,9}(?::[0-9]{1,9}){0,2}")
# Twice the longest announcement of an end in the scripts of slurm/ (--signal).
_SHORTEST_SECONDS = 600


class Cluster(BaseModel):
    """One cluster.

    Attributes:
        partition, account, qos, constraint, time, nodes, gpus_per_node, tasks_per_node: as sbatch knows them. A bare
            number as time is in minutes; tasks_per_node defaults to one for each GPU.
        setup: shell lines that make `python` the right one; the default is the environment `mor` runs in.
        container: image that the ranks run in. environment: further variables, such as NCCL's.
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
    def _long_enough_to_stop(cls, value: Any) -> Any:
        text = str(value) if type(value) is int else value
        if isinstance(text, str) and text and time_limit_seconds(text) < _SHORTEST_SECONDS:
            raise ValueError("give at least 10 minutes: jobs write a checkpoint 5 minutes before the end")
        return text

    @field_validator("environment", mode="before")
    @classmethod
    def _variables_are_text(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name, text in value.items():
            if not isinstance(name, str) or not _VARIABLE.fullmatch(name):
                raise ValueError(f"variable {name!r} has a name that no shell accepts")
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
    def ranks_per_node(self) -> int:
        """Processes of a training job on each node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def ranks(self) -> int:
        """Processes of a training job."""
        return self.nodes * self.ranks_per_node


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    default: str | None = None
    clusters: dict[str, Cluster]


def load_cluster(name: str = DEFAULT, **changes: Any) -> Cluster:
    """The named cluster of clusters.yaml (MOR_CLUSTERS names another file), with those `changes` that are not None.

    `default` is the cluster that the file's key `default` names; without such a key or file, it is a cluster of which
    nothing but `changes` is known.

    Raises:
        LaunchError: for an unreadable file, an unknown key, or a name the file does not have.
    """
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    file = Path(os.environ.get("MOR_CLUSTERS") or folder / "mor" / "clusters.yaml")
    content = _read(file)
    chosen = content.default if name == DEFAULT and DEFAULT not in content.clusters else name
    values: dict[str, Any] = {}
    if chosen is not None:
        if chosen not in content.clusters:
            known = plain(", ".join(content.clusters)) or f"none (copy {EXAMPLE} there)"
            raise LaunchError(f"{file}: no cluster '{plain(chosen)}'; it describes {known}.")
        values = content.clusters[chosen].model_dump(exclude_unset=True)
    values |= {key: value for key, value in changes.items() if value is not None}
    try:
        return Cluster.model_validate(values)
    except ValidationError as error:
        raise LaunchError(first_problem(error, Cluster)) from None


def _read(file: Path) -> _File:
    try:
        values = read_yaml(file)
        return _File.model_validate({} if values is None else values)
    except FileNotFoundError:
        return _File(clusters={})
    except RecipeError as error:
        raise LaunchError(str(error)) from None
    except ValidationError as error:
        raise LaunchError(f"{file}: {first_problem(error, _File)}") from None


def time_limit_seconds(text: str) -> float:
    """Seconds of a Slurm time limit (`minutes`, `m:s`, `h:m:s`, `d-h`, `d-h:m`, `d-h:m:s`, `UNLIMITED`).

    Raises:
        ValueError: it is none of these.
    """
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    if not _TIME.fullmatch(text):
        raise ValueError("is not a time limit; write 24:00:00, 2-12:00:00 or minutes")
    days, dash, rest = text.rpartition("-")
    fields = [int(field) for field in rest.split(":")]
    hours, minutes, seconds = ([*fields, 0, 0] if dash or len(fields) == 3 else [0, *fields, 0])[:3]
    return 86400.0 * int(days or 0) + 3600 * hours + 60 * minutes + seconds
