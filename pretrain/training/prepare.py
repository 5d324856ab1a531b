"""A run before its ranks meet: everything is resolved, and whatever a person can mend has been checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mor_model.config import ModelConfig
from mor_model.errors import ConfigError
from pretrain.checkpoints.branches import Extension, find_extension
from pretrain.errors import RecipeError, RunError
from pretrain.ranks.environment import Ranks
from pretrain.ranks.signals import CHECKPOINT_FILE, STOP_FILE
from pretrain.ranks.toolchain import accelerator_present
from pretrain.recipe.deepspeed_json import resolve_ds_config, zero_stage
from pretrain.recipe.plan import Branch, Plan, make_plan
from pretrain.recipe.recipe import Recipe
from pretrain.records.finished import begun_with, branch_path, branch_recipe, changed_keys
from pretrain.records.run_folder import RunFolder
from pretrain.training.open_data import OpenedData, open_data
from pretrain.training.zero_stage import StageChoice, choose_stage, with_stage

# What may lie in a run folder whose recipe is not written yet.
_BEFORE_THE_RECIPE = (STOP_FILE, CHECKPOINT_FILE, "stacks")


@dataclass(frozen=True)
class Prepared:
    """A run that has passed every check that needs no other rank.

    Attributes:
        recipe: with precision and DeepSpeed configuration resolved (not `auto`).
        extension: where it goes on when its folder was begun with another budget or schedule.
    """

    recipe: Recipe
    config: ModelConfig
    plan: Plan
    stage: StageChoice
    ds_config: dict[str, Any]
    data: OpenedData
    folder: RunFolder
    extension: Extension | None

    @property
    def shape(self) -> dict[str, Any]:
        """What a checkpoint must agree with beside the world size."""
        return {
            "zero_stage": zero_stage(self.ds_config),
            "precision": self.recipe.precision,
            "optimizer": self.recipe.optim.name,
        }


def prepare(recipe: Recipe, ranks: Ranks) -> Prepared:
    """Resolve and check a recipe for so many ranks.

    Raises:
        RecipeError, DataError, RunError: one sentence on what to change.
    """
    from pretrain.training.engine import resolve_precision
    from pretrain.training.evaluate_in_training import check_suites_of

    folder = RunFolder(recipe.run_folder)
    try:
        folder.recipe_file.is_file()
    except OSError as error:  # a name that is too long for a file system, a folder that may not be entered
        raise RunError(
            f"{folder}: cannot be a run folder ({error.strerror}); choose another name or run_dir."
        ) from None
    recipe = recipe.model_copy(update={"precision": resolve_precision(recipe.precision)})
    if recipe.precision == "fp16" and not accelerator_present():
        raise RecipeError("precision: fp16 wants a GPU, and this machine has none; use bf16, fp32 or auto.")
    config = recipe.network()
    if recipe.initial_weights is not None:
        _check_initial_weights(recipe.initial_weights, config)
    plan = make_plan(recipe)
    stage = choose_stage(recipe, config, ranks)
    recipe = with_stage(recipe, stage.config)
    ds_config = resolve_ds_config(recipe, ranks.world_size)
    quantized = [key for key, value in ds_config.get("zero_optimization", {}).items() if "quantized" in key and value]
    if quantized and not accelerator_present():
        raise RecipeError(
            f"deepspeed.config: zero_optimization.{quantized[0]} wants a GPU, and this machine has none; use zero3."
        )
    data = open_data(recipe, config, plan)
    extension = check_folder(folder, recipe, plan, data)
    check_suites_of(recipe)
    return Prepared(recipe, config, plan, stage, ds_config, data, folder, extension)


def prepare_branch(trunk: Prepared, branch: Branch, ranks: Ranks) -> Prepared:
    """The run of one smaller budget: the trunk's recipe with that budget, in a folder inside the trunk's."""
    warmup = trunk.plan.learning_rate.warmup
    path = branch_path(trunk.folder, branch)
    return prepare(branch_recipe(trunk.recipe, branch.amount, branch.name, warmup, path), ranks)


def check_folder(folder: RunFolder, recipe: Recipe, plan: Plan, data: OpenedData) -> Extension | None:
    """Refuse to continue another run than the one that the folder holds; where its budget has changed, see whether and
    from where it can go on.
    """
    begun = begun_with(recipe)
    if begun is None:
        # A start that was killed at once leaves temporary files, whose names begin with a dot.
        entries = [entry.name for entry in folder.path.iterdir()] if folder.path.is_dir() else []
        if any(not name.startswith(".") and name not in _BEFORE_THE_RECIPE for name in entries):
            raise RunError(f"{folder}: is not empty and holds no run; choose another run_dir or empty it.")
        return None
    if folder.plan_file.is_file():
        planned = folder.plan()
        for key, value, name in (
            ("tokenizer_fingerprint", data.fingerprint, "the tokenizer"),
            ("data_manifest", data.manifest, "the data"),
        ):
            if planned.get(key) != value:
                raise RunError(
                    f"{folder}: {name} has changed since the run began (was {str(planned.get(key))[:12]}, is "
                    f"{value[:12]}); "
                    "bring the data set back, or start a new run in another run_dir."
                )
    return find_extension(folder, begun, recipe, plan) if changed_keys(begun, recipe) else None


def _check_initial_weights(folder: str, config: ModelConfig) -> None:
    from mor_model.weights import check_start

    try:
        check_start(folder, config)
    except ConfigError as error:
        raise RecipeError(f"initial_weights: {error}") from None
