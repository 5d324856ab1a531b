"""One recipe is one run: typed, frozen and strict.

A recipe is a YAML file; `load_recipe` applies dotted overrides (`optim.lr=1e-3`) and checks everything that can be
checked without data, devices or ranks. An unknown key is refused with the nearest known one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from mor_model.config import ModelConfig
from mor_model.errors import ConfigError
from mor_model.presets import preset
from pretrain.errors import RecipeError
from pretrain.recipe.messages import first_problem
from pretrain.recipe.overrides import apply_override
from pretrain.recipe.sections import (
    Batch,
    Budget,
    CapacityWarmup,
    Checkpoint,
    Data,
    Deepspeed,
    DepthWarmup,
    Evaluation,
    Faults,
    Limits,
    Logging,
    Name,
    Optim,
    Precision,
    Schedule,
    Section,
    Whole,
)
from pretrain.recipe.yaml_input import read_yaml, write_yaml

# Keys of which a section has exactly one; choosing one on the command line replaces the file's choice.
EXCLUSIVE = {"budget": ("flops", "tokens", "steps"), "data": ("path", "sources")}


class Recipe(Section):
    """Everything a run needs; see the sections.

    Attributes:
        initial_weights: folder of weights that training starts from (`mor import` writes one, every finished run has
            one) instead of random ones; the optimiser starts anew.
        initial_weights_tokenizer: `same` refuses weights with another tokenizer beside them than the data's; `any`
            trains on all the same.
    """

    name: str
    seed: Whole = Field(default=0, ge=0)
    model: dict[str, Any]
    initial_weights: Name | None = None
    initial_weights_tokenizer: Literal["same", "any"] = "same"
    data: Data
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    budget: Budget
    batch: Batch
    precision: Precision = "auto"
    activation_checkpointing: Literal["none", "recursion", "layer", "selective"] = "recursion"
    compile: bool = False
    capacity_warmup: CapacityWarmup | None = None
    depth_warmup: DepthWarmup | None = None
    deepspeed: Deepspeed = Deepspeed()
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation = Evaluation()
    logging: Logging = Logging()
    faults: Faults = Faults()
    limits: Limits = Limits()
    run_dir: Name | None = None
    _network: ModelConfig = PrivateAttr()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(f"name: {self.name!r} names a folder; use letters, digits, '.', '_' and '-'")
        self._network = self._build_network()
        return self

    @property
    def run_folder(self) -> str:
        """Where the run lives: run_dir (`~` is the home folder), or runs/<name>."""
        return os.path.expanduser(self.run_dir) if self.run_dir is not None else f"runs/{self.name}"

    @property
    def network(self) -> ModelConfig:
        """The network's configuration, built when the recipe was checked."""
        return self._network

    def _build_network(self) -> ModelConfig:
        values = dict(self.model)
        try:
            if "preset" in values:
                name = str(values.pop("preset"))
                variant = values.pop("variant", "vanilla")
                recursions = values.pop("recursions", 3 if variant != "vanilla" else 1)
                config = preset(name, variant, recursions, **values)
            else:
                if "variant" in values:
                    raise ConfigError(
                        "model.variant: belongs to a preset; name one, or set sharing, recursions and router."
                    )
                config = ModelConfig.from_dict(values)
        except (ConfigError, TypeError) as error:
            raise RecipeError(str(error)) from None
        if self.batch.sequence_length > config.context_length:
            raise RecipeError(
                f"batch.sequence_length: {self.batch.sequence_length} exceeds model.context_length "
                f"({config.context_length}); "
                "shorten the sequences or raise the context."
            )
        if self.capacity_warmup is not None and (config.router is None or config.router.kind != "expert_choice"):
            raise RecipeError(
                "capacity_warmup: only expert-choice routing has capacities; remove it or choose such a router."
            )
        if self.depth_warmup is not None and config.recursions == 1:
            raise RecipeError("depth_warmup: the network has one recursion step; remove it or raise model.recursions.")
        if self.depth_warmup is not None and self.capacity_warmup is not None:
            raise RecipeError(
                "depth_warmup and capacity_warmup: both say how the recursion steps start; keep one of them."
            )
        return config

    def to_yaml(self) -> str:
        """The complete recipe as YAML that `load_recipe` reads back unchanged."""
        return write_yaml(self.model_dump(mode="json"))


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe file and apply `a.b=c` overrides (values are YAML).

    Raises:
        RecipeError: for a missing or unreadable file, an unknown key (naming the nearest known one), or an impossible
            value.
    """
    try:
        values = read_yaml(path)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe; recipes/ holds examples to copy.") from None
    if not isinstance(values, dict):
        raise RecipeError(
            f"{path}: a recipe is a mapping of sections (name, model, data, ...), not {type(values).__name__}."
        )
    return build_recipe(values, overrides, where=str(path))


def build_recipe(values: dict[str, Any], overrides: list[str] | tuple[str, ...] = (), where: str = "recipe") -> Recipe:
    """Build a recipe from plain values; see `load_recipe`."""
    for override in overrides:
        values = apply_override(values, override, EXCLUSIVE)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{where}: {first_problem(error, Recipe)}") from None
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
