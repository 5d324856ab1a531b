"""Overrides: known keys with odd values, and mutated ones."""

from __future__ import annotations

import random
from typing import Any

from pretrain.recipe.plan import make_plan
from pretrain.recipe.recipe import EXCLUSIVE, Recipe, build_recipe
from pretrain.recipe.yaml_input import parse_yaml
from tests.fuzz.recipes import RECIPES, override
from tests.fuzz.support import counts, drive, leaves, lost

BEFORE = [build_recipe(values).model_dump() for values in RECIPES]
Given = tuple[int, str]


@counts
def test_overrides(count: int) -> None:
    drive(count, make, use, seed="overrides", changed=changed, used=0.05, refused=0.25)


def make(source: random.Random) -> Given:
    number = source.randrange(len(RECIPES))
    return number, override(BEFORE[number], source)


def use(given: Given) -> Recipe:
    number, text = given
    recipe = build_recipe(RECIPES[number], [text])
    make_plan(recipe)
    return recipe


def changed(given: Given, recipe: Recipe) -> str | None:
    """The key that is named has the value that is given, and every other one the value it had."""
    number, text = given
    name, _, written = text.partition("=")
    path = tuple(name.strip().split("."))
    kept: Any = recipe.model_dump()
    after = leaves(kept)
    for key in path:
        kept = kept[key] if isinstance(kept, dict) and key in kept else ...
    if (difference := lost(parse_yaml(written, name), kept)) is not None:
        return f"{name}: {difference}"
    apart = {(*path[:-1], other) for other in EXCLUSIVE.get(path[0], ()) if path[-1] in EXCLUSIVE[path[0]]} | {path}
    for place, value in leaves(BEFORE[number]).items():
        # A section that was left out has its defaults as soon as one of its keys is given.
        mine = any(place[: len(one)] == one or one[: len(place)] == place for one in apart)
        if not mine and after.get(place, ...) != value:
            return f"{'.'.join(place)}: {value!r} became {after.get(place)!r}"
    return None
