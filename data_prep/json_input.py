"""JSON from outside: whatever is wrong with it is one `DataError` that names the place."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from data_prep.errors import DataError


def parse_json(text: str | bytes, where: object) -> Any:
    """The value of a JSON text; `where` begins the message when there is none.

    Raises:
        DataError: not UTF-8, not JSON, nested too deeply to be read, or a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not UTF-8 text (byte {error.start}).") from None
    except RecursionError:
        raise DataError(f"{where}: is nested too deeply to be read as JSON.") from None
    except ValueError as error:  # JSONDecodeError, or Python's limit on the digits of a whole number
        raise DataError(f"{where}: cannot be read as JSON: {error}.") from None


def read_json(path: str | os.PathLike[str], maximum_bytes: int = 1 << 30) -> Any:
    """The value of a JSON file.

    Raises:
        FileNotFoundError: there is no such file; only the caller knows what its absence means.
        DataError: as `parse_json`; or the file cannot be read or holds more than `maximum_bytes`.
    """
    try:
        with Path(path).open("rb") as stream:
            content = stream.read(maximum_bytes + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from None
    if len(content) > maximum_bytes:
        raise DataError(f"{path}: holds more than {maximum_bytes:,} bytes, which is no file of this kind.")
    return parse_json(content, path)
