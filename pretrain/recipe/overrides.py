"""Overrides from a command line: `section.key=value`, the value in YAML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.errors import RecipeError
from pretrain.recipe.messages import shorten
from pretrain.recipe.yaml_input import parse_yaml

_NOTHING: Mapping[str, tuple[str, ...]] = {}


def apply_override(
    values: dict[str, Any], text: str, exclusive: Mapping[str, tuple[str, ...]] = _NOTHING
) -> dict[str, Any]:
    """`values` with the one key replaced that `text` names; sections that are missing on the way are made.

    Args:
        exclusive: by section, keys of which it has one: choosing one takes the others away.

    Raises:
        RecipeError: `text` is not `section.key=value`, its value is not YAML, or its section is a single value.
    """
    where = f"override {shorten(text)}"
    name, equals, written = text.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys) or not name.isprintable():
        raise RecipeError(f"{where}: must have the form section.key=value, such as optim.lr=1e-3.")
    value = parse_yaml(written, where)
    if str(value).count("#") < written.count("#"):
        raise RecipeError(f"{where}: YAML reads what follows '#' as a comment; put the value in quotes.")
    result = dict(values)
    inner = result
    for depth, key in enumerate(keys[:-1]):
        section = inner.get(key)
        if section is not None and not isinstance(section, dict):
            kind = "a list, which is replaced as a whole" if isinstance(section, list) else "a single value"
            raise RecipeError(f"{where}: {'.'.join(keys[: depth + 1])} is {kind} and has no keys below it.")
        inner[key] = dict(section or {})
        inner = inner[key]
    alternatives = exclusive.get(keys[-2], ()) if len(keys) > 1 else ()
    if keys[-1] in alternatives and value is not None:
        for other in alternatives:
            inner.pop(other, None)
    inner[keys[-1]] = value
    return result
