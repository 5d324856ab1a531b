"""Evaluation sets from files: what a task of lm-evaluation-harness reads when it reads no hub.

Task files name `read_splits` as their `custom_dataset`, with one file per split in `dataset_kwargs`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

from data_prep.errors import DataError


def wikitext_pages(text: str) -> Iterator[str]:
    """Cut a raw WikiText file into pages, each beginning with its `= Title =` line.

    The rule is that of the document-level WikiText that lm-evaluation-harness reads: a line is a title when, with
    `= = =` and `= =` drawn together, it begins with `= ` and ends with ` =`. It gives 62 pages for the test split.
    """
    page: list[str] = []
    for line in text.split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            if "".join(page).strip():
                yield "\n".join(page)
            page = []
        page.append(line)
    yield "\n".join(page)


def _json_lines(path: Path) -> list[dict[str, Any]]:
    records = []
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: not JSON ({error}); the file is damaged, copy it again.") from None
            if not isinstance(record, dict):
                raise DataError(f"{path}:{number}: a JSON object was expected, found {type(record).__name__}.")
            records.append(record)
            # A question would be asked with "None" in the place of what is missing.
            if fault := _difference(records[0], record):
                raise DataError(f"{path}:{number}: {fault}; the file is damaged, copy it again.")
    return records


def _difference(first: dict[str, Any], record: dict[str, Any]) -> str | None:
    """What sets a record apart from the first of its file: a field that is missing, new, or of another kind."""
    for name in first.keys() | record.keys():
        if name not in record or name not in first:
            return f"{'lacks' if name not in record else 'has'} the field {name!r}, unlike the first record"
        kinds = [type(value[name]).__name__.replace("int", "float") for value in (first, record)]
        if kinds[0] != kinds[1]:
            return f"the field {name!r} holds {record[name]!r:.80}, which is of another kind than in the first record"
    return None


def _pages(path: Path) -> list[dict[str, Any]]:
    return [{"page": page} for page in wikitext_pages(path.read_text(encoding="utf-8"))]


_READERS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {".jsonl": _json_lines, ".raw": _pages}


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a `.jsonl` file, or the pages (field `page`) of a raw WikiText file (`.raw`).

    Raises:
        DataError: a line that is not a JSON object with the fields of the others, an ending that is not known, or no
            records at all.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}).") from None
    return _read_records(path, found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=8)
def _read_records(path: Path, changed_ns: int, size: int) -> list[dict[str, Any]]:
    """`read_records` of a file as it is while its time and size stay the same."""
    if path.suffix not in _READERS:
        raise DataError(
            f"{path}: evaluation sets are .jsonl or .raw files, not {path.suffix or 'files without an ending'}."
        )
    try:
        records = _READERS[path.suffix](path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from None
    if not records:
        raise DataError(f"{path}: holds no records; copy the file again.")
    return records


def read_splits(splits: dict[str, str], where: dict[str, Any] | None = None, limit: int | None = None, **_: Any) -> Any:
    """A `datasets.DatasetDict` with one split per file.

    Args:
        splits: file of each split by its name.
        where: keep only records with these values, such as {"subject": "anatomy"}.
        limit: keep only the first so many records of the splits that are evaluated, so that a task's preparation of
            its documents does not run over thousands that no one asks about. Examples are drawn from `training` and
            `fewshot`, which stay whole.
        **_: the task's metadata, which the harness passes along.

    Raises:
        DataError: as `read_records`, and when `where` leaves nothing or a field holds values of several kinds.
    """
    import pyarrow as pa
    from datasets import Dataset, DatasetDict

    loaded = {}
    for name, path in splits.items():
        records = read_records(Path(path))
        if where:
            records = [record for record in records if all(record.get(key) == value for key, value in where.items())]
            if not records:
                raise DataError(f"{path}: no record with {where}; copy the file again.")
        try:
            loaded[name] = Dataset.from_list(records[:limit] if name in ("validation", "test") else records)
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise DataError(f"{path}: a field holds values of several kinds ({error}); copy the file again.") from None
    return DatasetDict(loaded)
