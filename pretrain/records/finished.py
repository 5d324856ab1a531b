"""Whether a run is finished, from its recipe and the files in its run folders; and what may change between its starts.

A run is its trunk and every branch that its recipe names. Each is finished when its folder says so and was trained to
the budget and schedule that the recipe has now. Training, batch jobs, tables and comparisons all ask here, without
ranks or torch.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.plain_text import plain
from pretrain.errors import RunError, UserError
from pretrain.recipe.plan import Branch, Plan, make_plan
from pretrain.recipe.recipe import Recipe, load_recipe
from pretrain.recipe.sections import Budget
from pretrain.records.run_folder import RunFolder

# Sections that may change in the middle of a run, which then goes back to the last step that both have in common.
_EXTENDABLE = ("budget.", "schedule.")

# Sections and keys that may differ between the starts of one run; the table in docs/training.md names the same ones.
# The checkpoint decides about another ZeRO stage in `deepspeed`. Data is recognised by its contents, wherever it lies.
FREE = (
    "run_dir",
    "logging",
    "checkpoint",
    "evaluation",
    "faults",
    "limits",
    "compile",
    "activation_checkpointing",
    "deepspeed",
    "data.path",
    "data.sources.N.path",
    "data.verify",
    "data.skip_samples",
    "batch.micro_batch",
)
_PLACE_IN_A_LIST = re.compile(r"\.\d+(?=\.)")


@dataclass(frozen=True)
class Part:
    """One training of a run: its trunk, or a branch of it.

    Attributes:
        recipe: of this part, with its run folder; steps: where it ends.
        start: steps it takes over from the trunk (0 for the trunk); name: of the branch, None for the trunk.
    """

    recipe: Recipe
    steps: int
    start: int = 0
    name: str | None = None

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.recipe.run_folder)

    @property
    def finished(self) -> bool:
        return has_finished(self.recipe)


def parts(recipe: Recipe, plan: Plan | None = None) -> list[Part]:
    """The trunk of a run and then its branches, in the order they are trained; `plan` is the recipe's, None makes it.

    Raises:
        RecipeError: when the budget has no plan.
    """
    plan = plan or make_plan(recipe)
    trunk = RunFolder(recipe.run_folder)
    found = [Part(recipe, plan.steps)]
    for branch in plan.branches:
        path = branch_path(trunk, branch)
        shorter = branch_recipe(recipe, branch.amount, branch.name, plan.learning_rate.warmup, path)
        found.append(Part(shorter, branch.steps, branch.start, branch.name))
    return found


def unfinished(recipe: Recipe) -> list[Part]:
    """The parts of a run that still have to be trained; empty when the run is finished."""
    return [part for part in parts(recipe) if not part.finished]


def has_finished(recipe: Recipe) -> bool:
    """Whether the run folder of this recipe, apart from its branches, holds the finished training of this recipe."""
    folder = RunFolder(recipe.run_folder)
    # A damaged folder is not finished: its checkpoints say where it stands, and training says what is wrong.
    with contextlib.suppress(UserError, OSError):
        if folder.status().get("state") == "finished":
            return not changed_keys(load_recipe(folder.recipe_file), recipe)
    return False


def changed_keys(begun: Recipe, now: Recipe) -> dict[str, tuple[Any, Any]]:
    """Keys in which two recipes differ so that they are not the same training, each with (value begun with, value now).

    `auto` now is no difference: it stands for the value that the first start has chosen.
    """
    before, after = (flatten(recipe.model_dump(mode="json")) for recipe in (begun, now))
    keys = sorted(before.keys() | after.keys())
    return {
        key: (before.get(key), after.get(key))
        for key in keys
        if before.get(key) != after.get(key) and after.get(key) != "auto" and not _is_free(key)
    }


def _is_free(key: str) -> bool:
    key = _PLACE_IN_A_LIST.sub(".N", key)
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def begun_with(recipe: Recipe) -> Recipe | None:
    """The recipe that this recipe's run folder was begun with; None if the folder holds no run.

    Raises:
        RecipeError: that recipe cannot be read.
        RunError: it belongs to another run: more than budget and schedule has changed.
    """
    folder = RunFolder(recipe.run_folder)
    if not folder.recipe_file.is_file():
        return None
    begun = load_recipe(folder.recipe_file)
    for key, (before, now) in changed_keys(begun, recipe).items():
        if not key.startswith(_EXTENDABLE):
            raise RunError(
                f"{folder}: holds a run with {key} = {plain(repr(before))}, but the recipe now says "
                f"{plain(repr(now))}; set run_dir to a new folder, change the recipe back, or remove the old run."
            )
    return begun


def branch_recipe(recipe: Recipe, amount: float, name: str, warmup: int, path: Path) -> Recipe:
    """A trunk's recipe with another budget, in a folder of its own; `warmup` is the trunk's, in steps."""
    return recipe.model_copy(
        update={
            "name": f"{recipe.name}-{name}",
            "budget": Budget.model_validate({recipe.budget.unit: amount}),
            "schedule": recipe.schedule.model_copy(update={"warmup": warmup}),
            "run_dir": str(path),
        }
    )


def branch_path(folder: RunFolder, branch: Branch) -> Path:
    """Run folder of another budget of the run in `folder`."""
    return folder.path / "branches" / branch.name


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one dictionary with dotted keys; a section in a list has its place in its key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            flat |= flatten({str(place): item for place, item in enumerate(value)}, f"{prefix}{key}.")
        elif isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
