"""The plan of a run: everything that decides the shards, written down before the first of them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.errors import DataError
from data_prep.files import write_json
from data_prep.json_input import read_json
from data_prep.paths import inside
from data_prep.sources.base import Group, ReadOptions
from data_prep.sources.find import SourceFiles
from data_prep.sources.groups import KINDS
from data_prep.tokenizers.base import TokenizerInfo
from data_prep.typed import as_dataclass

WORK = ".work"  # folder inside the data set folder that holds what is needed until the manifest is written
PLAN = "plan.json"


@dataclass(frozen=True)
class Settings:
    """What decides the shards' bytes.

    validation, test: share of documents, chosen by the hash of their text with `split_seed`. max_tokens: training
    tokens to write at most (0: all). shuffle_seed: order of the documents (None: as in the sources). packing: `concat`
    or `best-fit`, the latter at `sequence_length`.
    """

    sources: tuple[SourceFiles, ...]
    options: ReadOptions = field(default_factory=ReadOptions)
    validation: float = 0.01
    test: float = 0.01
    split_seed: int = 0
    max_tokens: int = 0
    piece_bytes: int = 0
    shuffle_seed: int | None = None
    packing: str = "concat"
    sequence_length: int = 0

    def __post_init__(self) -> None:
        if self.validation < 0 or self.test < 0 or self.validation + self.test >= 1:
            raise DataError(
                f"the held-out shares must be 0 or more and leave something to train on; "
                f"found validation {self.validation} and test {self.test}."
            )
        if self.packing not in ("concat", "best-fit"):
            raise DataError(f"packing must be concat or best-fit, found {self.packing!r}.")
        if self.packing == "best-fit" and self.sequence_length < 2:
            raise DataError("best-fit packing needs --sequence-length, the length the model is trained at.")
        if self.shuffle_seed is not None and not 0 <= self.shuffle_seed < 2**63:
            raise DataError(f"the shuffle seed must be from 0 up and below 2**63, found {self.shuffle_seed}.")
        if self.max_tokens < 0:
            raise DataError(f"the maximum of tokens must be 0 (all) or more, found {self.max_tokens}.")


@dataclass(frozen=True)
class Plan:
    """Settings, the tokenizer, the engine that was chosen, and the groups of files. Workers need nothing else."""

    settings: Settings
    tokenizer: TokenizerInfo
    engine: dict[str, Any]
    groups: tuple[Group, ...]
    round_trip: dict[str, Any] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """What must be the same for a run to be continued: everything but the engine, which never changes an id."""
        value = self.to_dict()
        return {key: value[key] for key in ("settings", "tokenizer", "groups")}

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))


def write_plan(folder: str | os.PathLike[str], plan: Plan) -> None:
    """Write the plan into the data set folder's working folder."""
    write_json(Path(folder) / WORK / PLAN, plan.to_dict())


def read_plan(folder: str | os.PathLike[str]) -> Plan | None:
    """The plan of an unfinished run in `folder`, or None.

    Raises:
        DataError: there is one that cannot be read.
    """
    path = Path(folder) / WORK / PLAN
    try:
        plan = as_dataclass(Plan, read_json(path), path)
        inside(folder, plan.tokenizer.file, path)
        for number, group in enumerate(plan.groups):
            pieces = 1 if group.pieces is None else group.pieces
            sound = group.kind in KINDS and bool(group.files) == (group.kind not in ("embedded", "hub"))
            if not sound or group.number != number or pieces < 1 or group.bytes < 0 or group.piece_bytes < 0:
                raise DataError(f"{path}: group {number} cannot be {group!r:.300}.")
    except FileNotFoundError:
        return None
    except DataError as error:
        raise DataError(f"{error} Remove {path.parent} to begin again.") from None
    return plan


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Which settings differ, as `name: old -> new`."""
    found: list[str] = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            short = [str(value) if len(str(value)) < 60 else str(value)[:57] + "..." for value in (before, after)]
            found.append(f"{prefix}{key}: {short[0]} -> {short[1]}")
    return found


def changed_groups(old: Plan, new: Plan) -> list[int] | None:
    """Numbers of the groups that differ because files have changed; None if anything else differs."""
    if (old.settings, old.tokenizer) != (new.settings, new.tokenizer):
        return None
    numbers = range(max(len(old.groups), len(new.groups)))
    return [number for number in numbers if old.groups[number : number + 1] != new.groups[number : number + 1]]
