"""Overrides: known keys with odd values, and mutated ones."""

from __future__ import annotations

import random
from typing import Any

from pretrain.recipe.plan import make_plan
from pretrain.recipe.recipe import EXCLUSIVE, Recipe, build_recipe
from pretrain.recipe.yaml_input import parse_yaml, write_yaml
from tests.fuzz.recipes import RECIPES
from tests.fuzz.support import ODD_VALUES, counts, drive, leaves, lost, mutate_text

BEFORE = [build_recipe(values).model_dump() for values in RECIPES]
Given = tuple[int, str]


@counts
def test_overrides(count: int) -> None:
    drive(count, make, use, seed="overrides", changed=changed, used=0.05, refused=0.25)


def make(source: random.Random) -> Given:
    number = source.randrange(len(RECIPES))
    path, value = source.choice(list(leaves(BEFORE[number]).items()))
    # A section as well as what is in it.
    key = ".".join(path[: source.randint(1, len(path))])
    if source.random() < 0.5:
        value = source.choice(ODD_VALUES)
    text = f"{key}={write_yaml(value).removesuffix(chr(10)).removesuffix('...').removesuffix(chr(10))}"
    return number, mutate_text(text, source) if source.random() < 0.5 else text


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
