"""The error for configurations and arguments that cannot be used, and what its messages are made of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A configuration that cannot be built; the message says what is wrong and what would be right, in one sentence."""


def refuse_unknown_keys(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise `ConfigError` for the first key of `given` that is not in `known`, naming the nearest known one."""
    known = list(known)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys are {', '.join(sorted(known))}."
            raise ConfigError(f"{where}: unknown key {shown(key)}; {hint}")


def shown(value: object) -> str:
    """A value from a file as a message shows it: its representation, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no number of more than 4,300 digits
        return "a value that is too large to show"
    return text if len(text) <= 200 else f"{text[:200]}..."
