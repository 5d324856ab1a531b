"""Values from JSON as the dataclasses that describe them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from data_prep.errors import DataError
from data_prep.plain_text import plain

T = TypeVar("T")
Count = Annotated[int, Field(ge=0, lt=1 << 63)]  # of bytes, documents, tokens; or a number that begins at 0


@lru_cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def as_dataclass(kind: type[T], value: Any, where: object) -> T:
    """`value`, as JSON has it, as a `kind`: every field is there and of the type its annotation says.

    Nothing is converted but lists to tuples; keys that are no fields are left out.

    Raises:
        DataError: beginning with `where`; names the first field that is missing or of another type.
    """
    try:
        adapter = _adapter(kind)  # type: ignore[arg-type]  # classes can be hashed
        made = adapter.validate_json(json.dumps(value), strict=True)
        missing = next(_missing(asdict(made), value), "")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = plain(".".join(map(str, first["loc"])))[:200] or "the whole"
        found = plain(repr(first["input"]))[:100]
        raise DataError(f"{where}: {place}: {first['msg'][:200]}, found {found}.") from None
    except RecursionError:
        raise DataError(f"{where}: is nested too deeply.") from None
    if missing:
        raise DataError(f"{where}: has no {missing}.")
    assert isinstance(made, kind)
    return made


def _missing(fields: Any, value: Any, place: str = "") -> Iterator[str]:
    """Fields, at any depth, that `value` does not have, so that their defaults were taken."""
    if isinstance(fields, dict):
        for name, part in fields.items():
            if name not in value:
                yield place + name
            else:
                yield from _missing(part, value[name], f"{place}{name}.")
    elif isinstance(fields, list | tuple):
        for number, (part, own) in enumerate(zip(fields, value)):
            yield from _missing(part, own, f"{place}{number}.")
