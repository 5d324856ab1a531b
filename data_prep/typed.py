"""Values from JSON as the dataclasses that describe them."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from data_prep.errors import DataError
from data_prep.plain_text import plain

T = TypeVar("T")
_adapter = lru_cache(TypeAdapter)


def as_dataclass(kind: type[T], value: Any, where: object) -> T:
    """`value`, as JSON has it, as a `kind`, with every field of the type its annotation says.

    Nothing is converted but lists to tuples; keys that are no fields are left out.

    Raises:
        DataError: beginning with `where`; names the first field that is missing or of another type.
    """
    try:
        return _adapter(kind).validate_json(json.dumps(value), strict=True)
    except (ValidationError, RecursionError) as error:
        if not isinstance(error, ValidationError):
            raise DataError(f"{where}: is nested too deeply.") from None
        first = error.errors(include_url=False)[0]
        place = plain(".".join(map(str, first["loc"])))[:200] or "the whole"
        found = plain(repr(first["input"]))[:100]
        raise DataError(f"{where}: {place}: {first['msg'][:200]}, found {found}; write the file again.") from None
