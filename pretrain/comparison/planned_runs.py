"""What an experiment will cost: every run's recipe, steps, tokens and FLOPs, before training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from data_prep.plain_text import cell, plain
from data_prep.reading.manifest import FILE_NAME, read_manifest
from data_prep.tokenizers.loading import load_tokenizer
from mor_model.config import ModelConfig
from pretrain.comparison import numbers
from pretrain.comparison.experiment import TRAIN_TOKENIZER, Experiment, Trial
from pretrain.errors import RecipeError, RunError, UserError
from pretrain.evaluation.suites import check_suites
from pretrain.recipe.plan import Plan, make_plan
from pretrain.recipe.recipe import Recipe, build_recipe, load_recipe
from pretrain.records.finished import changed_keys, parts
from pretrain.records.run_folder import RunFolder


@dataclass(frozen=True)
class PlannedRun:
    """One run of an experiment with its checked recipe, network and plan."""

    trial: Trial
    label: str
    recipe: Recipe
    network: ModelConfig
    plan: Plan

    @property
    def new_flops(self) -> float:
        """Training FLOPs spent on this run alone: on all its steps, or on a branch's decay."""
        steps = self.plan.learning_rate.decay if self.trial.trunk is not None else self.plan.steps
        return self.plan.training_flops * steps / self.plan.steps


def plan_experiment(experiment: Experiment, arms: list[str] | None = None) -> list[PlannedRun]:
    """Resolve every run of the experiment (or of some arms).

    Raises:
        RecipeError: for an evaluation suite that does not exist; an impossible recipe, naming the arm; or arms that
            do not share what makes their losses comparable.
    """
    try:
        check_suites(experiment.evaluation.suites)
    except UserError as error:
        raise RecipeError(f"evaluation.suites: {error}") from None
    vocabulary = _vocab_size(experiment)
    trials = experiment.trials(arms)
    by_folder = {trial.folder: trial for trial in trials}
    found: dict[Trial, PlannedRun] = {}
    for trial in trials:
        if trial.trunk is not None:
            continue  # comes with its trunk
        values = experiment.recipe_values(trial)
        model = values.get("model", {})
        if vocabulary is not None and isinstance(model, dict):
            values["model"] = {"vocab_size": vocabulary, **model}
        recipe = build_recipe(values, where=f"arm '{trial.arm}'")
        try:
            for part in parts(recipe):
                own = by_folder[part.folder.path]
                plan = make_plan(part.recipe)
                found[own] = PlannedRun(own, experiment.label(own.arm), part.recipe, recipe.network, plan)
        except RecipeError as error:
            raise RecipeError(f"arm '{trial.arm}': {error}") from None
    planned = [found[trial] for trial in trials]
    _refuse_unlike(planned)
    return planned


def other_recipe(run: PlannedRun) -> str | None:
    """How the recipe in the run folder differs from the experiment's, with what to do; None where it does not."""
    folder = RunFolder(run.trial.folder)
    try:
        found = load_recipe(folder.recipe_file)
    except RecipeError as error:
        return f"{error} Remove {folder} to train this arm again."
    for key, (before, now) in changed_keys(found, run.recipe).items():
        return (
            f"{folder}: was begun with another recipe ({key} was {plain(repr(before))}, the experiment says "
            f"{plain(repr(now))}); remove that folder to train it again, or keep it and give the experiment a name of "
            "its own (name=NAME)."
        )
    return None


def jobs(planned: list[PlannedRun]) -> list[list[PlannedRun]]:
    """The runs of each training process: a run that is no branch, then its branches."""
    own = [run for run in planned if run.trial.trunk is None]
    return [[run, *(other for other in planned if other.trial.trunk == run.trial.folder)] for run in own]


def _vocab_size(experiment: Experiment) -> int | None:
    """Vocabulary of the prepared data, else of runs trained on them, else of the tokenizer they will be prepared with;
    None where it is not known yet.
    """
    for folder in experiment.source_folders or [experiment.data_path]:
        if (folder / FILE_NAME).is_file():
            return read_manifest(folder).tokenizer.vocab_size
    for trial in experiment.trials():
        with contextlib.suppress(RunError):
            size = RunFolder(trial.folder).model().get("vocab_size")
            if type(size) is int:
                return size
    if experiment.data.corpus is not None and experiment.data.tokenizer == TRAIN_TOKENIZER:
        return experiment.data.vocab_size
    if Path(experiment.data.tokenizer).exists():
        return load_tokenizer(experiment.data.tokenizer).vocab_size
    return None


def plan_table(runs: Iterable[PlannedRun]) -> Table:
    """The plan for a terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("run", no_wrap=True)
    for head in ("stored", "applied", "FLOPs/token", "tokens", "steps", "training FLOPs"):
        table.add_column(head, justify="right", no_wrap=True)
    for run in runs:
        plan = run.plan
        table.add_row(
            cell(run.trial.name),
            numbers.si(plan.parameters["total_stored"]),
            numbers.si(plan.parameters["applied"]),
            numbers.si(plan.flops_per_sequence / plan.sequence_length),
            numbers.si(plan.tokens),
            numbers.whole(plan.steps),
            numbers.power_of_ten(plan.training_flops, 4),
        )
    return table


def _refuse_unlike(planned: list[PlannedRun]) -> None:
    """Arms of one vocabulary, one text and one unit of budget: nats per token of two vocabularies do not compare."""
    first = planned[0]
    for run in planned[1:]:
        both = f"arms '{first.trial.arm}' and '{run.trial.arm}'"
        if run.network.vocab_size != first.network.vocab_size:
            raise RecipeError(
                f"{both} have vocabularies of {first.network.vocab_size} and {run.network.vocab_size}; leave "
                "model.vocab_size out, so that both take the tokenizer's."
            )
        if _texts(run.recipe) != _texts(first.recipe):
            raise RecipeError(
                f"{both} read different data sets, so they are validated on different text; mix the same data sets, "
                "with other weights."
            )
        if run.recipe.budget.unit != first.recipe.budget.unit:
            raise RecipeError(
                f"{both} have budgets in {first.recipe.budget.unit} and in {run.recipe.budget.unit}; give both the "
                "same unit."
            )


def _texts(recipe: Recipe) -> set[tuple[str | None, str | None]]:
    """Data set folders, and the part of each that is read."""
    data = recipe.data
    return {(source.path, source.subset) for source in data.sources} if data.sources else {(data.path, None)}
