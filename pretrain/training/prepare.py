"""A recipe becomes a run: everything is resolved and checked here, once.

Nothing after this builds network, plan, ZeRO stage, DeepSpeed JSON or data again; the dry run, the loop and the
branches read the values of `Prepared`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mor_model.config import ModelConfig
from mor_model.errors import ConfigError
from mor_model.weights import check_start
from pretrain.checkpoints.branches import Extension, find_extension
from pretrain.errors import RecipeError, RunError
from pretrain.ranks.environment import Ranks
from pretrain.ranks.signals import CHECKPOINT_FILE, STOP_FILE
from pretrain.ranks.toolchain import accelerator_present
from pretrain.recipe.deepspeed_json import zero_stage
from pretrain.recipe.plan import Plan, make_plan
from pretrain.recipe.recipe import Recipe
from pretrain.records.finished import Part, begun_with, changed_keys, parts
from pretrain.records.run_folder import RunFolder
from pretrain.training.engine import resolve_precision
from pretrain.training.evaluate_in_training import check_suites_of
from pretrain.training.open_data import OpenedData, open_data, with_plan
from pretrain.training.zero_stage import StageChoice, choose_stage, with_stage

# What may lie in a run folder whose recipe is not written yet.
_BEFORE_THE_RECIPE = (STOP_FILE, CHECKPOINT_FILE, "stacks")


@dataclass(frozen=True)
class Prepared:
    """A run that has passed every check that needs no other rank.

    Attributes:
        recipe: with precision and DeepSpeed configuration resolved (not `auto`).
        parts: the run itself and its branches, in the order they are trained.
        extension: where the run goes on when its folder was begun with another budget or schedule.
    """

    recipe: Recipe
    plan: Plan
    stage: StageChoice
    data: OpenedData
    parts: tuple[Part, ...]
    extension: Extension | None

    @property
    def network(self) -> ModelConfig:
        return self.recipe.network

    @property
    def ds_config(self) -> dict[str, Any]:
        """The complete configuration that DeepSpeed is started with."""
        return self.stage.ds_config

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.recipe.run_folder)

    @property
    def shape(self) -> dict[str, Any]:
        """What a checkpoint must agree with beside the world size."""
        return {
            "zero_stage": zero_stage(self.ds_config),
            "precision": self.recipe.precision,
            "optimizer": self.recipe.optim.name,
        }


def prepare(recipe: Recipe, ranks: Ranks) -> Prepared:
    """Resolve and check a recipe for these ranks.

    Raises:
        RecipeError, DataError, RunError: one sentence on what to change.
    """
    folder = RunFolder(recipe.run_folder)
    try:
        folder.recipe_file.is_file()
    except OSError as error:  # a name that is too long for a file system, a folder that may not be entered
        raise RunError(
            f"{folder}: cannot be a run folder ({error.strerror}); choose another name or run_dir."
        ) from None
    recipe = recipe.model_copy(update={"precision": resolve_precision(recipe.precision)})
    if recipe.precision == "fp16" and not accelerator_present():
        raise RecipeError("precision: fp16 requires a GPU; none was found. Use bf16, fp32 or auto.")
    if recipe.initial_weights is not None:
        _check_initial_weights(recipe.initial_weights, recipe.network)
    plan = make_plan(recipe)
    stage = choose_stage(recipe, ranks)
    recipe = with_stage(recipe, stage.config)
    zero = stage.ds_config["zero_optimization"]
    quantized = [key for key, value in zero.items() if "quantized" in key and value]
    if quantized and not accelerator_present():
        raise RecipeError(
            f"deepspeed.config: zero_optimization.{quantized[0]} requires a GPU; none was found. Use zero3."
        )
    data = open_data(recipe, plan)
    extension = check_folder(recipe, plan, data)
    check_suites_of(recipe)
    return Prepared(recipe, plan, stage, data, tuple(parts(recipe, plan)), extension)


def prepare_branch(trunk: Prepared, branch: Part) -> Prepared:
    """A smaller budget of a prepared run: the trunk's values with the branch's recipe and plan."""
    plan = make_plan(branch.recipe)
    data = with_plan(trunk.data, branch.recipe, plan)
    extension = check_folder(branch.recipe, plan, data)
    return replace(trunk, recipe=branch.recipe, plan=plan, data=data, parts=(branch,), extension=extension)


def check_folder(recipe: Recipe, plan: Plan, data: OpenedData) -> Extension | None:
    """Refuse to continue another run than the one that the recipe's folder holds. Where its budget has changed, say
    whether and from where it can go on.
    """
    folder = RunFolder(recipe.run_folder)
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
                    f"{value[:12]}); bring the data set back, or start a new run in another run_dir."
                )
    return find_extension(folder, begun, recipe, plan) if changed_keys(begun, recipe) else None


def _check_initial_weights(folder: str, network: ModelConfig) -> None:
    try:
        check_start(folder, network)
    except ConfigError as error:
        raise RecipeError(f"initial_weights: {error}") from None
