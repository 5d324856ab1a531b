"""Is this run finished? One question, asked of a resolved recipe and of the files in its run folders.

A run is its trunk and every branch that its recipe names. Each of them is finished when its folder says so and was
trained to the budget and the schedule that the recipe says now. Training, batch jobs, tables and comparisons all ask
here, and need neither ranks nor torch for it.
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

# Sections of a recipe that may change in the middle of a run.
EXTENDABLE = ("budget.", "schedule.")

# What may differ between the starts of one run without making it another run.
_FREE = (
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
    "data.verify",
    "data.skip_samples",
    "batch.micro_batch",
)
# Data is told by its contents, wherever it lies.
_MOVED_SOURCE = re.compile(r"data\.sources\.\d+\.path")


@dataclass(frozen=True)
class Part:
    """One training of a run: its trunk, or a branch of it.

    Attributes:
        recipe: as this part is trained, with its run folder; steps: at which it ends.
        start: steps it has from the trunk (0 of the trunk itself); name: of the branch, None of the trunk.
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
    """What of a run is still to be trained; empty when the run is finished."""
    return [part for part in parts(recipe) if not part.finished]


def has_finished(recipe: Recipe) -> bool:
    """Whether the run folder of this recipe alone, without branches, holds the finished training of this recipe."""
    folder = RunFolder(recipe.run_folder)
    # Of a damaged folder the checkpoints tell where it stands, and training says what is wrong with it.
    with contextlib.suppress(UserError, OSError):
        if folder.status().get("state") == "finished":
            return not changed_keys(load_recipe(folder.recipe_file), recipe)
    return False


def changed_keys(begun: Recipe, now: Recipe) -> dict[str, tuple[Any, Any]]:
    """Keys in which two recipes differ so that they are not the same training: (what it was begun with, what it is
    now). `auto`, which stands for what the start has chosen, is no difference.
    """
    before, after = (flatten(recipe.model_dump(mode="json")) for recipe in (begun, now))
    keys = sorted(before.keys() | after.keys())
    return {
        key: (before.get(key), after.get(key))
        for key in keys
        if before.get(key) != after.get(key)
        and after.get(key) != "auto"
        and not key.startswith(_FREE)
        and not _MOVED_SOURCE.fullmatch(key)
    }


def begun_with(recipe: Recipe) -> Recipe | None:
    """The recipe that this recipe's run folder was begun with; None where nothing was begun.

    Raises:
        RecipeError: that recipe cannot be read.
        RunError: it is another run's: more than budget and schedule has changed.
    """
    folder = RunFolder(recipe.run_folder)
    if not folder.recipe_file.is_file():
        return None
    begun = load_recipe(folder.recipe_file)
    for key, (before, now) in changed_keys(begun, recipe).items():
        if not key.startswith(EXTENDABLE):
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
    """Nested sections, and those in lists by their place, as one dictionary with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            flat |= flatten({str(place): item for place, item in enumerate(value)}, f"{prefix}{key}.")
        elif isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
