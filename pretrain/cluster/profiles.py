"""Clusters a person submits to, described once in `~/.config/mor/clusters.yaml`; `slurm/clusters.yaml` is one to copy.

What the command line says goes before what a profile says.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pretrain.errors import LaunchError

EXAMPLE = Path(__file__).resolve().parents[2] / "slurm" / "clusters.yaml"


class Profile(BaseModel):
    """One cluster.

    Attributes:
        partition, account, qos, constraint, time, nodes, gpus_per_node, tasks_per_node: as sbatch knows them;
            tasks_per_node is one for each GPU unless given.
        setup: shell lines that make `python` the right one; the environment `mor` runs in unless given.
        container: image the ranks run in. environment: further variables, such as NCCL's.
        launcher: `srun` or `deepspeed`. health: look at the nodes before training (`check`), or also leave bad ones out
            (`exclude`).
        requeue: whether a job may put itself back into the queue. chain: elements of the array that replaces it.
        options: further options of sbatch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

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
    options: tuple[str, ...] = ()

    @field_validator("time", mode="before")
    @classmethod
    def _yaml_reads_times_as_numbers(cls, value: Any) -> Any:
        # YAML 1.1 takes 24:00:00 for a number in base 60.
        if isinstance(value, int) and not isinstance(value, bool):
            return f"{value // 3600:02d}:{value // 60 % 60:02d}:{value % 60:02d}"
        return value

    @field_validator("environment", mode="before")
    @classmethod
    def _variables_are_text(cls, value: Any) -> Any:
        return {name: str(text) for name, text in value.items()} if isinstance(value, dict) else value

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
    if file.is_file():
        try:
            content = _File.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
        except (OSError, yaml.YAMLError) as error:
            raise LaunchError(f"{file}: cannot be read as YAML: {error}") from None
        except ValidationError as error:
            raise LaunchError(f"{file}: {_first_fault(error)}") from None
        chosen = name or content.default
        if chosen is not None:
            if chosen not in content.clusters:
                raise LaunchError(f"{file}: no cluster '{chosen}'; it describes {', '.join(content.clusters)}.")
            values = content.clusters[chosen].model_dump(exclude_unset=True)
    elif name is not None:
        raise LaunchError(f"cluster '{name}': there is no {file} that could describe it; copy {EXAMPLE} there.")
    values |= {key: value for key, value in changes.items() if value is not None}
    try:
        return Profile.model_validate(values)
    except ValidationError as error:
        raise LaunchError(_first_fault(error)) from None


def _first_fault(error: ValidationError) -> str:
    import difflib

    fault = error.errors()[0]
    place = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = [*Profile.model_fields, "default", "clusters"]
        near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
        return f"unknown key '{place}'; " + (f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}.")
    return f"{place}: {fault['msg']}."
