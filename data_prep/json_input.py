"""JSON from outside; a `DataError` names the place of what cannot be used."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from data_prep.errors import DataError


def parse_json(text: str | bytes, where: object, unique_keys: bool = False) -> Any:
    """The value of a JSON text; `where` begins the message when there is none.

    Args:
        unique_keys: whether a key given twice is an error; otherwise the last one counts.

    Raises:
        DataError: not UTF-8, not JSON, nested too deeply to be read, or a number of thousands of digits.
    """
    try:
        return json.loads(text, object_pairs_hook=_refuse_repeated if unique_keys else None)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not UTF-8 text (byte {error.start}).") from None
    except RecursionError:
        raise DataError(f"{where}: is nested too deeply to be read as JSON.") from None
    except ValueError as error:  # JSONDecodeError, or Python's limit on the digits of a whole number
        raise DataError(f"{where}: cannot be read as JSON: {error}.") from None


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return found


def read_json(path: str | os.PathLike[str], maximum_bytes: int = 1 << 30, unique_keys: bool = False) -> Any:
    """The value of a JSON file.

    Raises:
        FileNotFoundError: there is no such file; the caller says what its absence means.
        DataError: as `parse_json`; or the file cannot be read or holds more than `maximum_bytes`.
    """
    try:
        with Path(path).open("rb") as stream:
            content = stream.read(maximum_bytes + 1)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # the latter is a name that no file can have
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    if len(content) > maximum_bytes:
        raise DataError(f"{path}: holds more than {maximum_bytes:,} bytes, which is no file of this kind.")
    return parse_json(content, path, unique_keys)
