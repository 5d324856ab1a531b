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
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from data_prep.errors import DataError
from data_prep.files import write_json

FORMAT_VERSION = 1
FILE_NAME = "manifest.json"
SPLITS = ("train", "validation", "test")
# What may differ between two runs that wrote the same shards; left out of the digest.
_VOLATILE = ("created", "version", "engine")


@dataclass(frozen=True)
class TokenizerInfo:
    """Which tokenizer wrote the shards.

    kind: `sentencepiece`, `huggingface` or `tiktoken`. fingerprint: sha256 of what decides ids (hex). vocab_size: every
    id is below it. eod_id: END_OF_DOCUMENT, the last token of every document. file: path of the copy, relative to the
    data set folder.
    """

    kind: str
    fingerprint: str
    vocab_size: int
    eod_id: int
    file: str


@dataclass(frozen=True)
class Shard:
    """One `.bin`/`.idx` pair.

    name: file name without ending, relative to the folder. tokens: including each document's END_OF_DOCUMENT.
    text_bytes: UTF-8 bytes of the documents. sha256_bin, sha256_idx: hex digests. source: name of the source (or Pile
    subset) that all its documents come from.
    """

    name: str
    tokens: int
    documents: int
    text_bytes: int
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
    dtype: str
    splits: dict[str, Split]
    sources: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    rejects: dict[str, int] = field(default_factory=dict)
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
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{folder} is not a finished data set: it has no {FILE_NAME}. "
            "Run `python -m data_prep tokenize` (again) with this folder as --out."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}); write the data set again.") from None
    if not isinstance(value, dict) or value.get("format_version") != FORMAT_VERSION:
        found = value.get("format_version") if isinstance(value, dict) else type(value).__name__
        raise DataError(f"{path}: format_version {FORMAT_VERSION} was expected, found {found!r}.")
    known = {f.name for f in fields(Manifest)}
    try:
        splits = {
            name: Split(tuple(_build(Shard, shard, path) for shard in split["shards"]))
            for name, split in value["splits"].items()
        }
        tokenizer = _build(TokenizerInfo, value["tokenizer"], path)
        rest = {k: v for k, v in value.items() if k in known - {"tokenizer", "splits"}}
        manifest = Manifest(tokenizer=tokenizer, splits=splits, **rest)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: a field is missing or has the wrong type ({error!r}); write the data set again."
        ) from None
    _check_rest(manifest, path)
    if manifest.dtype not in ("uint16", "int32"):
        raise DataError(f"{path}: dtype must be uint16 or int32, found {manifest.dtype!r}.")
    unknown = set(splits) - set(SPLITS)
    if unknown:
        raise DataError(f"{path}: unknown split {sorted(unknown)[0]!r}; known are {', '.join(SPLITS)}.")
    return manifest


def _check_rest(manifest: Manifest, path: Path) -> None:
    for name in ("settings", "engine", "rejects", "statistics"):
        if not isinstance(getattr(manifest, name), dict):
            raise DataError(f"{path}: {name} must be an object, found {getattr(manifest, name)!r}.")
    if not isinstance(manifest.sources, list):
        raise DataError(f"{path}: sources must be a list, found {manifest.sources!r}.")
    for source in manifest.sources:
        counts = (
            [source.get(key) for key in ("documents", "tokens", "text_bytes")] if isinstance(source, dict) else [None]
        )
        if any(not isinstance(count, int) for count in counts) or not isinstance(source.get("name"), str):
            raise DataError(f"{path}: a source must have a name, documents, tokens and text_bytes, found {source!r}.")
    packed = manifest.settings.get("packing") == "best-fit"
    if packed and not isinstance(manifest.settings.get("sequence_length"), int):
        raise DataError(f"{path}: best-fit packing needs settings.sequence_length, an integer.")


_T = TypeVar("_T")


def _build(cls: type[_T], value: dict[str, Any], path: Path) -> _T:
    """`cls(**value)` with every field present and of the type its annotation says."""
    types = {"str": str, "int": int}
    for f in fields(cls):  # type: ignore[arg-type]
        found = value.get(f.name)
        if not isinstance(found, types[str(f.type)]) or isinstance(found, bool):
            raise DataError(f"{path}: {cls.__name__}.{f.name} must be {f.type}, found {found!r}.")
        if isinstance(found, int) and found < 0:
            raise DataError(f"{path}: {cls.__name__}.{f.name} is negative ({found}).")
    return cls(**{f.name: value[f.name] for f in fields(cls)})  # type: ignore[arg-type]
