"""Recipe files, mutated as text and as values, and overrides of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.recipe.plan import make_plan
from pretrain.recipe.recipe import EXCLUSIVE, Recipe, build_recipe, load_recipe
from pretrain.recipe.yaml_input import parse_yaml, write_yaml
from tests.fuzz.recipes import RECIPES, override
from tests.fuzz.support import counts, drive, from_file, leaves, lost, mutate_text, mutate_values

BEFORE = [build_recipe(values).model_dump() for values in RECIPES]


def as_values(source: random.Random) -> str:
    return write_yaml(mutate_values(source.choice(RECIPES), source))


def as_text(source: random.Random) -> str:
    return mutate_text(write_yaml(source.choice(RECIPES)), source)


@counts
@pytest.mark.parametrize(("make", "used"), [(as_values, 0.05), (as_text, 0.01)])
def test_recipes(count: int, make: Callable[[random.Random], str], used: float, tmp_path: Path) -> None:
    """An accepted recipe holds everything as written, and is written so that it reads back as itself."""

    def read(file: Path) -> Recipe:
        recipe = load_recipe(file)
        make_plan(recipe)
        return recipe

    def changed(text: str, recipe: Recipe) -> str | None:
        difference = lost(parse_yaml(text, "the file"), recipe.model_dump())
        return difference or lost(recipe.model_dump(mode="json"), parse_yaml(recipe.to_yaml(), "what is written"))

    drive(count, make, from_file(tmp_path / "recipe.yaml", read), changed=changed, used=used, refused=0.5)


@counts
def test_overrides(count: int) -> None:
    """The key that is named has the value that is given, and every other one the value it had."""

    def make(source: random.Random) -> tuple[int, str]:
        number = source.randrange(len(RECIPES))
        return number, override(BEFORE[number], source)

    def use(given: tuple[int, str]) -> Recipe:
        number, text = given
        recipe = build_recipe(RECIPES[number], [text])
        make_plan(recipe)
        return recipe

    def changed(given: tuple[int, str], recipe: Recipe) -> str | None:
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

    drive(count, make, use, changed=changed, used=0.05, refused=0.25)
