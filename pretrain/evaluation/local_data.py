"""Evaluation sets from files: what a task of lm-evaluation-harness reads when it reads no hub.

Task files name `read_splits` as their `custom_dataset`, with one file per split in `dataset_kwargs`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import orjson

from data_prep.errors import DataError
from data_prep.sources.wikitext import begins_page


def wikitext_pages(text: str) -> list[dict[str, Any]]:
    """The pages of a raw WikiText file, each from its title to the next one, as records with the field `page`."""
    pages: list[list[str]] = [[]]
    for line in text.split("\n"):
        if begins_page(line):
            if not "".join(pages[-1]).strip():
                pages.pop()
            pages.append([])
        pages[-1].append(line)
    return [{"page": "\n".join(page)} for page in pages]


def _json_lines(path: Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
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
        if differing := _kinds(record) ^ _kinds(records[0]):
            raise DataError(
                f"{path}:{number}: the field {min(differing)[0]!r} is missing here or in the first record, or is of "
                "another kind there; the file is damaged, copy it again."
            )
    return records


def _kinds(record: dict[str, Any]) -> set[tuple[str, str]]:
    return {(name, type(value).__name__.replace("int", "float")) for name, value in record.items()}


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a `.jsonl` file, or the pages (field `page`) of a raw WikiText file (`.raw`).

    Raises:
        DataError: a line that is not a JSON object with the fields of the others, an unknown ending, or no records.
    """
    try:
        found = path.stat()
        return _read_records(path, found.st_mtime_ns, found.st_size)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from None


@functools.lru_cache(maxsize=8)  # the 57 subjects of MMLU lie in one file
def _read_records(path: Path, changed_ns: int, size: int) -> list[dict[str, Any]]:
    """`read_records` of a file as it is while its time and size stay the same."""
    if path.suffix == ".jsonl":
        records = _json_lines(path)
    elif path.suffix == ".raw":
        records = wikitext_pages(path.read_text(encoding="utf-8"))
    else:
        raise DataError(f"{path}: evaluation sets are .jsonl or .raw files, not {path.suffix or 'without an ending'}.")
    if not records:
        raise DataError(f"{path}: holds no records; copy the file again.")
    return records


def read_splits(splits: dict[str, str], where: dict[str, Any] | None = None, limit: int | None = None, **_: Any) -> Any:
    """A `datasets.DatasetDict` with one split per file.

    Args:
        splits: file of each split by its name.
        where: keep only records with these values, such as {"subject": "anatomy"}.
        limit: records kept of each split that is evaluated; without it a task would prepare all of them.
            Few-shot examples are drawn from `training` and `fewshot`, which stay whole.
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
