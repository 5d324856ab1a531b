"""Values from a run's JSON files, each checked for its type; an error names the file and the key."""

from __future__ import annotations

import math
import sys
from typing import Any, TypeVar

from pretrain.errors import RunError

# Above any amount of tokens, FLOPs or bytes, and far below where products overflow.
_MOST = 1e60
Default = TypeVar("Default")
_NEEDED: Any = object()


class Fields:
    """A JSON object whose values are read by type; `where` begins the message of every error.

    Raises (all methods that read):
        RunError: the value is missing and there is no `default`, or it has another type.
    """

    def __init__(self, values: object, where: object) -> None:
        self.where = where
        if not isinstance(values, dict):
            raise RunError(f"{where}: is {values!r:.100}, not a JSON object.")
        self.values: dict[str, Any] = values

    def number(self, name: str, default: Default = _NEEDED) -> float | Default:
        """A measured number; nan where it is null or not finite, since JSON has no word for that."""
        value = self._value(name, default)
        if name not in self.values:
            return value
        if value is None:
            return math.nan
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._other(name, "a number")
        return float(value) if abs(value) <= sys.float_info.max else math.nan

    def amount(self, name: str, default: Default = _NEEDED) -> float | Default:
        """A number that was counted or planned: finite and not negative. Null counts as missing."""
        value = self._value(name, default)
        if value is None and default is not _NEEDED:
            return default
        if value is default and name not in self.values:
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < _MOST:
            raise self._other(name, "an amount")
        return value

    def count(self, name: str, default: Default = _NEEDED) -> int | Default:
        """A whole number, not negative."""
        value = self._value(name, default)
        if name in self.values and not is_count(value):
            raise self._other(name, "a whole number, not negative")
        return value

    def text(self, name: str, default: Default = _NEEDED) -> str | Default:
        value = self._value(name, default)
        if name in self.values and not isinstance(value, str):
            raise self._other(name, "text")
        return value

    def object(self, name: str) -> dict[str, Any]:
        """An object; empty where it is null or missing."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise self._other(name, "a JSON object")
        return value or {}

    def objects(self, name: str) -> list[dict[str, Any]]:
        """A list of objects; empty where it is null or missing."""
        value = self.values.get(name) or []
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self._other(name, "a list of JSON objects")
        return value

    def numbers(self, name: str) -> list[float]:
        """A list of measured numbers, null among them as nan; empty where it is null or missing."""
        values = self.values.get(name) or []
        if not isinstance(values, list):
            raise self._other(name, "a list of numbers")
        item = Fields(dict(zip(map(str, range(len(values))), values)), f"{self.where}: {name}")
        return [item.number(place) for place in item.values]

    def shares(self, name: str) -> list[float]:
        """A list of numbers from 0 to 1; empty where it is null or missing."""
        values = self.numbers(name)
        if not all(-1e-6 <= value <= 1 + 1e-6 for value in values):
            raise self._other(name, "a list of shares")
        return values

    def _value(self, name: str, default: Any) -> Any:
        if name not in self.values and default is _NEEDED:
            raise RunError(f"{self.where}: {name} is missing.")
        return self.values.get(name, default)

    def _other(self, name: str, wanted: str) -> RunError:
        return RunError(f"{self.where}: {name} is {self.values[name]!r:.100}, not {wanted}.")


def is_count(value: object) -> bool:
    """Whether a value from JSON is a whole number from 0 to the largest that files and libraries hold."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
