"""The manifest of a data set folder: what its shards are, which tokenizer wrote them, and what was left out.

`manifest.json` is written last, so a folder with a manifest is complete. Layout of the folder:

    manifest.json
    tokenizer/tokenizer.model | tokenizer.json      copy of the tokenizer
    <shard name>.bin, <shard name>.idx              Megatron indexed data sets, one pair per entry of `shards`
    held_out/validation.jsonl.zst, test.jsonl.zst   raw text of the held-out documents
    rejects.jsonl                                   every document that was left out, with file and line
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from data_prep.errors import DataError
from data_prep.files import write_json
from data_prep.json_input import read_json
from data_prep.paths import inside
from data_prep.tokenizers.base import TokenizerInfo
from data_prep.typed import Count, as_dataclass

FORMAT_VERSION = 1
FILE_NAME = "manifest.json"
SPLITS = ("train", "validation", "test")
_LONGEST_NAME = 200  # bytes of a shard's name; file systems have 255, endings included
# What may differ between two runs that wrote the same shards; left out of the digest.
_VOLATILE = ("created", "version", "engine")


@dataclass(frozen=True)
class Shard:
    """One `.bin`/`.idx` pair.

    name: file name without ending, relative to the folder. tokens: including each document's END_OF_DOCUMENT.
    text_bytes: UTF-8 bytes of the documents. sha256_bin, sha256_idx: hex digests. source: name of the source (or Pile
    subset) that all its documents come from.
    """

    name: str
    tokens: Count
    documents: Count
    text_bytes: Count
    sha256_bin: str
    sha256_idx: str
    source: str


@dataclass(frozen=True)
class Split:
    """The shards of one split in reading order, and their sums."""

    shards: tuple[Shard, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        return sum(shard.text_bytes for shard in self.shards)

    def to_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "shards": [asdict(shard) for shard in self.shards],
        }


@dataclass(frozen=True)
class Manifest:
    """All that is known of a data set folder.

    dtype: `uint16` or `int32`, the type of the ids in `.bin`. splits: by name, only those that hold documents. sources:
    one entry per source name with documents, tokens and text bytes. settings: what decided the shards (never how many
    workers wrote them). engine: encoder, versions, and how many texts went back to the reference. rejects: documents
    left out, by reason. statistics: length histogram, round trip and the like.
    """

    tokenizer: TokenizerInfo
    dtype: Annotated[str, Field(pattern="^(uint16|int32)$")]
    splits: dict[Annotated[str, Field(pattern=f"^({'|'.join(SPLITS)})$")], Split]
    sources: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    rejects: dict[str, Count] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    created: str = ""
    version: str = ""
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        value = {f.name: getattr(self, f.name) for f in fields(self)}
        value["tokenizer"] = asdict(self.tokenizer)
        value["splits"] = {name: split.to_dict() for name, split in self.splits.items()}
        return {"format_version": value.pop("format_version"), **value}

    def digest(self) -> str:
        """sha256 (hex) of everything that decides what is read; folders with the same shards have the same digest."""
        value = {key: part for key, part in self.to_dict().items() if key not in _VOLATILE}
        return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


class _Source(BaseModel):
    name: str
    documents: Count
    tokens: Count
    text_bytes: Count


class _Settings(BaseModel):
    sequence_length: Count = 0
    packing: Any = None


class _Engine(BaseModel):
    fallbacks: Count = 0


class _RoundTrip(BaseModel, extra="allow"):
    example: Any = None
    __pydantic_extra__: dict[str, Count]


class _Packed(BaseModel):
    sequences: Count
    padding: float
    truncation: float


class _Statistics(BaseModel):
    filtered: dict[str, Count] = {}
    lengths_log2: dict[str, Annotated[list[Count], Field(max_length=64)]] = {}
    round_trip: _RoundTrip = _RoundTrip.model_validate({})
    packing: dict[str, Count | _Packed | Annotated[dict[str, Any], Field(max_length=0)]] = {}


@dataclass(frozen=True)
class _Read:
    """What is read of the parts of a manifest that are otherwise free."""

    sources: list[_Source]
    settings: _Settings
    engine: _Engine
    statistics: _Statistics


def write_manifest(folder: str | os.PathLike[str], manifest: Manifest) -> None:
    """Write `folder`/manifest.json atomically."""
    write_json(Path(folder) / FILE_NAME, manifest.to_dict())


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read and check `folder`/manifest.json.

    Raises:
        DataError: no manifest, unreadable JSON, another format version, or a missing or mistyped field.
    """
    path = Path(folder) / FILE_NAME
    try:
        value = read_json(path)
    except FileNotFoundError:
        raise DataError(
            f"{folder} is not a finished data set: it has no {FILE_NAME}. "
            "Run `python -m data_prep tokenize` (again) with this folder as --out."
        ) from None
    if not isinstance(value, dict) or value.get("format_version") != FORMAT_VERSION:
        found = value.get("format_version") if isinstance(value, dict) else type(value).__name__
        raise DataError(f"{path}: format_version {FORMAT_VERSION} was expected, found {found!r:.100}.")
    try:
        manifest = as_dataclass(Manifest, value, path)
        read = as_dataclass(_Read, {part.name: value[part.name] for part in fields(_Read)}, path)
        if read.settings.packing == "best-fit" and not read.settings.sequence_length:
            raise DataError(f"{path}: best-fit packing needs settings.sequence_length.")
        inside(path.parent, manifest.tokenizer.file, path)
        check_names((shard for split in manifest.splits.values() for shard in split.shards), path)
    except DataError as error:
        raise DataError(f"{error} Copy the data set again, or write it again.") from None
    return manifest


def check_names(shards: Iterable[Shard], path: Path) -> None:
    """Check that the shards in the manifest or receipt at `path` are named like files of the data set folder.

    Raises:
        DataError: names the first that is not.
    """
    for shard in shards:
        if not re.fullmatch(r"[^/\x00\ud800-\udfff]+", shard.name) or len(shard.name.encode()) > _LONGEST_NAME:
            raise DataError(
                f"{path}: a shard is named {shard.name!r:.100}, which is not a plain file name of this folder."
            )
