"""Recipe files: mutated as text and as values."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from pretrain.recipe.plan import make_plan
from pretrain.recipe.recipe import Recipe, load_recipe
from pretrain.recipe.yaml_input import parse_yaml, write_yaml
from tests.fuzz.recipes import RECIPES
from tests.fuzz.support import counts, drive, lost, mutate_text, mutate_values

TEXTS = [write_yaml(values) for values in RECIPES]


@pytest.mark.parametrize("values", RECIPES)
def test_the_recipes_that_are_mutated_are_accepted(values: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(write_yaml(values), encoding="utf-8")
    recipe = load_recipe(file)
    make_plan(recipe)
    assert lost(values, recipe.model_dump()) is None


@counts
def test_recipes_as_values(count: int, tmp_path: Path) -> None:
    def make(source: random.Random) -> str:
        return write_yaml(mutate_values(source.choice(RECIPES), source))

    drive(count, make, reader(tmp_path), seed="values", changed=changed, used=0.05, refused=0.5)


@counts
def test_recipes_as_text(count: int, tmp_path: Path) -> None:
    def make(source: random.Random) -> str:
        return mutate_text(source.choice(TEXTS), source)

    drive(count, make, reader(tmp_path), seed="text", changed=changed, used=0.01, refused=0.5)


def reader(folder: Path) -> Any:
    file = folder / "recipe.yaml"

    def read(text: str) -> Recipe:
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        recipe = load_recipe(file)
        make_plan(recipe)
        return recipe

    return read


def changed(text: str, recipe: Recipe) -> str | None:
    """An accepted recipe holds everything as written, and is written so that it reads back as itself."""
    difference = lost(parse_yaml(text, "the file"), recipe.model_dump())
    return difference or lost(recipe.model_dump(mode="json"), parse_yaml(recipe.to_yaml(), "what is written"))
