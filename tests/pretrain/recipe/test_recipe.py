"""A recipe is read completely or refused in one sentence that names the key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.comparison.experiment import load_experiment
from pretrain.errors import RecipeError
from pretrain.recipe.recipe import build_recipe, load_recipe
from pretrain.recipe.sections import Amount
from pretrain.recipe.yaml_input import write_yaml
from tests.fuzz.support import LIMIT_SECONDS, processor_time
from tests.pretrain.support import ROOT, recipe_values, write_recipe


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    return recipe_values(tmp_path / "data", tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("optm.lr=1", "optim"),
        ("optim.lrr=1", "optim.lr"),
        ("optim.learning_decay=1", "optim.weight_decay"),
        ("optim.weight-decay=0", "optim.weight_decay"),
        ("Optim.lr=1", "optim"),
        ("batch.micro_batches=1", "batch.micro_batch"),
        ("schedule.warm_up=1", "schedule.warmup"),
        ("checkpoint.keep_evry=1", "checkpoint.keep_every"),
        ("model.hiden_size=64", "hidden_size"),
        ("model.router={knd: expert_choice}", "kind"),
        ("sed=1", "seed"),
        ("schedule.warmup={token: 5}", "tokens"),
        ("data={sources: [{path: a, wight: 2}]}", "data.sources.0.weight"),
        ("evaluation.suites={name: [own]}", "evaluation.suites.names"),
        ("evaluation.maxshare=0.1", "evaluation.max_share"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_nearest_one(values: dict[str, Any], override: str, near: str) -> None:
    with pytest.raises(RecipeError, match=rf"unknown key '.*did you mean '{near}'"):
        build_recipe(values, [override])


def test_a_key_that_is_like_no_other_is_refused_with_those_there_are(values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"unknown key 'learning-rate'; known are name, seed, model, .*, run_dir\.$"):
        build_recipe(values, ["learning-rate=1"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=fast", "optim.lr: must be a number"),
        ("optim.lr=-1", "optim.lr"),
        ("optim.lr=.nan", "optim.lr"),
        ("optim.lr=.inf", "optim.lr.*finite"),
        ("optim.betas=[0.9]", "optim.betas"),
        ("optim.betas=[0.9, 1.5]", "betas"),
        ("seed=1.5", "seed: must be a whole number"),
        ("checkpoint.keep_best=maybe", "keep_best: must be true or false"),
        ("seed=-1", "seed"),
        ("name=a/b", "name"),
        ("precision=bf8", "precision"),
        ("schedule.kind=wsdd", "schedule.kind"),
        ("schedule.warmup=1.5", "schedule.warmup"),
        ("schedule.warmup=-3", "schedule.warmup"),
        ("schedule.warmup={tokens: 1, flops: 1}", "exactly one"),
        ("batch.sequences=7", "multiple of micro_batch"),
        ("batch.sequence_length=64", "context_length"),
        ("data={path: b, sources: [{path: a}]}", "exactly one"),
        ("data.skip_samples=[[5, 3]]", "skip_samples"),
        ("data.packing=best_fit", "data.packing"),
        ("evaluation.max_share=1", "evaluation.max_share"),
        ("evaluation.suites={names: [own], limit: 0}", "evaluation.suites.limit"),
        ("budget.branches=[20]", "branches"),
        ("model.num_layers=6", "nearest valid depths"),
        ("model.variant=mor", "variant"),
        ("optim=3", "optim: must be a section with keys of its own"),
        ("evaluation.suites={names: own}", r"suites.names: must be a list, such as \[a, b\]"),
        ("optim.lr.x=3", "single value"),
        ("data.skip_samples.0=3", "data.skip_samples: must be a list"),
        ("optim.lr", "section.key=value"),
        ("=3", "section.key=value"),
        ("optim..lr=3", "section.key=value"),
        ("optim.lr=[", "override 'optim.lr=.': cannot be read as YAML"),
        ("optim.lr=1 # high", "what follows '#' as a comment"),
        ("optim.lr='1e-3'", "optim.lr: must be a number .given: '1e-3'"),
        ("optim={lr: 1, lr: 2}", "'lr' stands twice"),
        ("model.norm_eps=text", "model.norm_eps: must be a positive number"),
        ('data.path="a\\0b"', "null character"),
        ('data.path="a\\ud800b"', "lone surrogate"),
        ("data.path=a\udcffb", "cannot be read as YAML"),
    ],
)
def test_an_impossible_value_is_refused_by_name(values: dict[str, Any], override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        build_recipe(values, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 10**30),
        ("seed", 1e300),
        ("budget.steps", 10**12),
        ("budget.branches", list(range(1, 200))),
        ("batch.sequences", 2**40),
        ("batch.micro_batch", 2**64),
        ("batch.sequence_length", 2**40),
        ("batch.warmup_from", 2**64),
        ("schedule.warmup", 10**12),
        ("schedule.decay", 1e300),
        ("checkpoint.every", 2**64),
        ("checkpoint.every_minutes", 1e300),
        ("checkpoint.keep", 10**30),
        ("evaluation.sequences", 2**40),
        ("evaluation.suites", {"names": ["own"], "text_bytes": 2**60}),
        ("evaluation.suites", {"names": ["own"], "limit": 10**30}),
        ("logging.every", 10**30),
        ("data.skip_samples", [[0, 10**30]]),
        ("faults.max_non_finite", 10**30),
        ("faults.spike_window", 10**12),
        ("limits.wall_clock_hours", 1e300),
        ("limits.stall_seconds", 1e300),
        ("model.recursions", 10**30),
        ("model.num_layers", 2**40),
        ("model.vocab_size", 10**30),
        ("model.hidden_size", 2**40),
        ("model.context_length", 10**30),
    ],
)
def test_a_number_that_is_too_large_is_refused_by_name_before_anything_is_made_of_it(
    values: dict[str, Any], key: str, value: object
) -> None:
    with processor_time(LIMIT_SECONDS), pytest.raises(RecipeError, match=f"{key}\\b"):
        build_recipe(values, [f"{key}={write_yaml(value).removesuffix('...' + chr(10))}"])


def test_a_bomb_is_refused_wherever_yaml_is_read(values: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("[" * 1000, encoding="utf-8")
    reads: list[Callable[[], object]] = [
        lambda: load_recipe(file),
        lambda: load_experiment(file),
        lambda: build_recipe(values, ["seed=" + "[" * 1000]),
    ]
    for read in reads:
        with processor_time(LIMIT_SECONDS), pytest.raises(RecipeError, match="cannot be read as YAML") as caught:
            read()
        assert len(str(caught.value)) < 1000


def test_numbers_are_those_of_yaml_1_2_in_files_and_overrides(values: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    text = (
        write_yaml(values)
        .replace("hidden_size: 32", "hidden_size: 32\n  norm_eps: 1e-6")
        .replace("seed: 7", "seed: 1e3")
    )
    file.write_text(text, encoding="utf-8")
    recipe = load_recipe(file, ["model.rope_theta=5e5", "optim.eps=1e-9", "budget.steps=1e2", "evaluation.every=1e1"])
    assert (recipe.network.norm_eps, recipe.network.rope_theta, recipe.optim.eps) == (1e-6, 5e5, 1e-9)
    assert (recipe.seed, recipe.budget.steps, recipe.evaluation.every) == (1000, 100, 10)


@pytest.mark.parametrize("name", ["1e-6", "0o17", "1_000", "on", "24:00", ".5", "2026-01-02", "~", "=", "a\n#b"])
def test_text_that_looks_like_something_else_is_written_as_text(
    values: dict[str, Any], name: str, tmp_path: Path
) -> None:
    recipe = build_recipe({**values, "data": {"path": name}, "initial_weights": name})
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(again) == recipe


def test_a_depth_warmup_wants_depth_and_no_other_warmup(values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="one recursion step"):
        build_recipe(values, ["depth_warmup.length=4", "model.router=null", "model.recursions=1", "model.sharing=none"])
    with pytest.raises(RecipeError, match="keep one of them"):
        build_recipe(values, ["depth_warmup.length=4", "capacity_warmup.length=4"])


def test_a_capacity_warmup_wants_capacities(values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="capacity_warmup"):
        build_recipe(values, ["capacity_warmup={length: 4}", "model.router=null"])


def test_missing_sections_are_named(values: dict[str, Any]) -> None:
    for name in ("name", "model", "data", "budget", "batch"):
        without = {key: value for key, value in values.items() if key != name}
        with pytest.raises(RecipeError, match=f"'{name}' is missing"):
            build_recipe(without)


def test_dotted_overrides_replace_single_values_and_leave_the_rest(values: dict[str, Any]) -> None:
    recipe = build_recipe(values, ["optim.lr=1e-3", "model.hidden_size=64", "logging.tensorboard=true", "seed=11"])
    assert (recipe.optim.lr, recipe.model["hidden_size"], recipe.logging.tensorboard, recipe.seed) == (
        1e-3,
        64,
        True,
        11,
    )
    assert recipe.optim.betas == (0.9, 0.95) and recipe.model["num_layers"] == values["model"]["num_layers"]
    assert values["model"]["hidden_size"] == 32, "the values given are not changed"


def test_an_override_of_the_budget_replaces_the_recipes_kind_of_budget(values: dict[str, Any]) -> None:
    assert build_recipe(values, ["budget.flops=1e9"]).budget.unit == "flops"


def test_lengths_are_steps_shares_or_amounts(values: dict[str, Any]) -> None:
    recipe = build_recipe(values, ["schedule.warmup=7", "schedule.decay=0.25", "checkpoint.every={tokens: 1e6}"])
    assert recipe.schedule.warmup == 7 and recipe.schedule.decay == 0.25
    assert recipe.checkpoint.every == Amount(tokens=1e6)


def test_the_resolved_recipe_reads_back_as_itself(values: dict[str, Any], tmp_path: Path) -> None:
    recipe = build_recipe(values, ["checkpoint.keep_every={flops: 1e9}", "data.skip_samples=[[1, 2], [5, 9]]"])
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(again) == recipe


def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "absent.yaml")
    for text in ("- a\n- b\n", "a: [b\n", ""):
        (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(RecipeError, match=r"r\.yaml"):
            load_recipe(tmp_path / "r.yaml")


def test_a_recipe_is_frozen(values: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", values))
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*m-*.yaml")), ids=lambda file: file.stem)
def test_the_papers_recipes_hold_the_papers_settings(file: Path) -> None:
    recipe = load_recipe(file)
    config = recipe.network
    size, variant, *rest = recipe.name.split("-")
    assert file.stem == recipe.name
    assert config.hidden_size == {"135m": 576, "360m": 960}[size]
    assert config.recursions == (int(rest[0][1:]) if rest else 1)
    assert (config.router is not None) == (variant == "mor")
    assert recipe.batch.sequences * recipe.batch.sequence_length == 1024 * 2048
    assert (recipe.optim.lr, recipe.optim.betas, recipe.optim.weight_decay) == (3e-3, (0.9, 0.95), 0.1)
    assert (recipe.schedule.kind, recipe.schedule.warmup, recipe.schedule.decay) == ("wsd", 0.05, 0.2)
    assert yaml.safe_load(file.read_text(encoding="utf-8"))["precision"] == "bf16"
