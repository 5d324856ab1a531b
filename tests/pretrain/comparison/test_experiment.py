from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretrain.comparison.experiment import Experiment, load_experiment
from pretrain.comparison.planned_runs import plan_experiment
from pretrain.errors import RecipeError
from pretrain.recipe.recipe import Recipe, build_recipe
from pretrain.recipe.yaml_input import write_yaml
from tests.pretrain.support import recipe_values

ROOT = Path(__file__).resolve().parents[3]

MINIMAL = """
name: small
base:
  seed: 3
  budget: {flops: 1e13}
  optim.lr: 1e-3
arms:
  vanilla:
  mor: {model.variant: mor, model: {recursions: 3}, optim: {lr: 2e-3}}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        file = tmp_path / "experiment.yaml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


def test_an_arm_is_the_base_with_its_own_values_laid_upon_it(write):
    experiment = load_experiment(write(MINIMAL))
    vanilla, mor = (experiment.recipe_values(trial) for trial in experiment.trials())
    assert vanilla["optim"] == {"lr": 1e-3} and mor["optim"] == {"lr": 2e-3}
    assert "model" not in vanilla and mor["model"] == {"variant": "mor", "recursions": 3}
    assert vanilla["budget"] == mor["budget"] == {"flops": 1e13}
    assert vanilla["data"] == mor["data"] == {"path": "data/small"}
    assert (vanilla["run_dir"], mor["run_dir"]) == ("runs/small/vanilla", "runs/small/mor")
    assert vanilla["seed"] == mor["seed"] == 3
    more_seeds = load_experiment(write(MINIMAL + "seeds: [3, 4, 5]\n"))
    assert {trial.folder for trial in experiment.trials()} < {trial.folder for trial in more_seeds.trials()}


def test_smaller_budgets_branch_off_the_largest_run(write):
    text = MINIMAL.replace("  budget: {flops: 1e13}\n", "") + "seeds: [3, 4]\nbudgets: [2.5e13, 1e13]\n"
    experiment = load_experiment(write(text))
    trials = experiment.trials(["mor"])
    assert [str(trial.folder.relative_to(experiment.folder)) for trial in trials] == [
        "mor/branches/1e13",
        "mor-seed4/branches/1e13",
        "mor",
        "mor-seed4",
    ]
    assert [trial.trunk for trial in trials] == [trials[2].folder, trials[3].folder, None, None]
    trunk = experiment.recipe_values(trials[3])
    assert trunk["budget"] == {"flops": 2.5e13, "branches": [1e13]} and trunk["seed"] == 4


def test_budgets_are_runs_of_their_own_without_a_decay_to_branch(write):
    text = MINIMAL.replace("  budget: {flops: 1e13}\n", "  schedule.kind: cosine\n") + "budgets: [1e13, 2.5e13]\n"
    experiment = load_experiment(write(text))
    assert [trial.name for trial in experiment.trials()] == ["vanilla-1e13", "mor-1e13", "vanilla-2.5e13", "mor-2.5e13"]
    assert all(trial.trunk is None for trial in experiment.trials())
    assert experiment.recipe_values(experiment.trials()[0])["budget"] == {"flops": 1e13}


def test_overrides_are_applied_before_checking(write):
    file = write(MINIMAL.replace("  optim.lr: 1e-3", "  optim: {eps: 1e-6}\n  optim.lr: 1e-3"))
    overrides = ["data.corpus=books/*.jsonl", "base.optim.lr=5e-4", "base.budget.steps=7", "runs=~/elsewhere"]
    experiment = load_experiment(file, overrides)
    assert experiment.data.corpus == "books/*.jsonl"
    vanilla = experiment.recipe_values(experiment.trials()[0])
    assert vanilla["optim"] == {"eps": 1e-6, "lr": 5e-4} and vanilla["budget"] == {"steps": 7}
    assert experiment.trials()[0].folder == Path.home() / "elsewhere" / "vanilla"


def test_a_missing_file_and_a_missing_arm_are_named(write, tmp_path):
    with pytest.raises(RecipeError, match=r"nothing\.yaml: no such experiment"):
        load_experiment(tmp_path / "nothing.yaml")
    with pytest.raises(RecipeError, match="did you mean 'mor'"):
        load_experiment(write(MINIMAL)).trials(["mro"])


def base_values(**changes: Any) -> dict[str, Any]:
    values = recipe_values(Path("data"), Path("run"), **changes)
    return {key: value for key, value in values.items() if key not in ("name", "run_dir")}


# What an arm that differs in one key of a recipe says.
IN_AN_ARM: dict[str, Any] = {
    "name": "other",
    "seed": 9,
    "model": {"intermediate_size": 96},
    "initial_weights": "weights",
    "initial_weights_tokenizer": "any",
    "data": {"anneal": 3, "verify": "checksums", "skip_samples": [[1, 2]]},
    "optim": {"name": "muon", "lr": 0.5, "betas": [0.5, 0.6]},
    "schedule": {"kind": "cosine", "warmup": {"tokens": 1000}},
    "budget": {"steps": 20},
    "batch": {"sequences": 16, "warmup_from": 4, "warmup": 3},
    "precision": "bf16",
    "activation_checkpointing": "layer",
    "compile": True,
    "capacity_warmup": {"length": 4},
    "depth_warmup": {"length": 4},
    "deepspeed": {"config": "zero1"},
    "checkpoint": {"keep": 7, "log_spaced": True},
    "evaluation": {"every": 3},
    "logging": {"every": 2, "wandb": "offline"},
    "faults": {"spike": 1.5},
    "limits": {"wall_clock_hours": 2},
    "run_dir": "elsewhere",
}
BELONGS_ELSEWHERE = {"name": "rename the arm", "seed": "seeds", "run_dir": "runs"}


@pytest.mark.parametrize("key", Recipe.model_fields)
def test_every_key_that_an_arm_names_is_in_its_recipe_or_refused(key, write):
    base = base_values()
    values = {"name": "small", "base": base, "arms": {"plain": {}, "extra": {key: IN_AN_ARM[key]}}}
    file = write(write_yaml(values))
    if key in BELONGS_ELSEWHERE:
        with pytest.raises(RecipeError, match=rf"arms\.extra\.{key}: .*{BELONGS_ELSEWHERE[key]}"):
            load_experiment(file)
        return
    plain, extra = (run.recipe for run in plan_experiment(load_experiment(file)))
    one = IN_AN_ARM[key]
    changed = {**base[key], **one} if isinstance(base.get(key), dict) else one
    wanted = getattr(build_recipe({**base, "name": "extra", key: changed}), key)
    assert getattr(extra, key) == wanted != getattr(plain, key)
    others = set(Recipe.model_fields) - {key, "name", "run_dir"}
    assert {name: getattr(plain, name) for name in others} == {name: getattr(extra, name) for name in others}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": {"name": "a"}}, r"base\.name: a run is called after its arm"),
        ({"base": {"run_dir": "a"}}, r"base\.run_dir: .*set the experiment's runs"),
        ({"base": {"budget": {"flops": 2, "branches": [1]}}}, r"base\.budget\.branches: .*budgets"),
        ({"arms": {"extra": {"data.path": "b"}}}, r"arms\.extra\.data\.path: all arms read the same text"),
        ({"arms": {"extra": {"evaluation.sequences": 5}}}, r"arms\.extra\.evaluation\.sequences: .*same text"),
        ({"arms": {"extra": {"budget.steps": 5}}, "budgets": [1, 2]}, r"arms\.extra\.budget is given too"),
        ({"base": {"seed": 3}, "seeds": [4, 5]}, r"seeds: base\.seed \(3\) is not one of them"),
        ({"base": {"data.sources": [{"path": "a"}]}, "data": {"path": "b"}}, r"base\.data\.sources names the text too"),
        ({"base": {"optim.lr": 1, "optim": {"lr": 2}}}, r"'optim\.lr' is given twice"),
        ({"base": {"optim": 1, "optim.lr": 2}}, r"'optim' is given twice"),
        (
            {"base": {"seed": 4}, "arms": {"a": {}, "a-seed5": {}}, "seeds": [4, 5]},
            r"'a-seed5' and of arm 'a' would both be .*a-seed5;",
        ),
        ({"budgets": [1.0000001e13, 1.0000002e13, 2e13]}, "first six digits"),
        ({"arms": {"logs": {}}}, "'logs' is a folder of the experiment's own"),
        ({"arms": {"a/b": {}}}, "arms: 'a/b' becomes a folder's name"),
        ({"arms": {"-x": {}}}, "arms: '-x' becomes a folder's name"),
        ({"seeds": list(range(5000)), "budgets": [1, 2, 3]}, "15,000 runs, more than 10,000"),
    ],
)
def test_what_the_experiment_decides_is_refused_elsewhere(change, message, write):
    values = {"name": "small", "base": {}, "arms": {"extra": {}}, **change}
    with pytest.raises(RecipeError, match=message):
        load_experiment(write(write_yaml(values)))


def test_arms_that_mix_other_data_sets_are_refused(write):
    base = base_values(data={"sources": [{"path": "a"}, {"path": "b"}]})

    def planned(sources):
        arms = {"even": {}, "uneven": {"data": {"sources": sources}}}
        return plan_experiment(load_experiment(write(write_yaml({"name": "small", "base": base, "arms": arms}))))

    even, uneven = planned([{"path": "a", "weight": 3}, {"path": "b"}])
    assert even.recipe.data.path is None and [source.path for source in even.recipe.data.sources] == ["a", "b"]
    assert [source.weight for source in uneven.recipe.data.sources] == [3, 1]
    with pytest.raises(RecipeError, match="'even' and 'uneven' read different data sets"):
        planned([{"path": "a"}, {"path": "c"}])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("base.optim.lr=[", "cannot be read as YAML"),
        ("evalutaion={suites: [own]}", "'evalutaion'; did you mean 'evaluation'"),
        ("launch.rank=2", r"'launch\.rank'; did you mean 'launch\.ranks'"),
        ("launch={launcher: python, ranks: 2}", "launch: .*one process, not 2"),
        ("reference=vanila", "'vanila'; did you mean 'vanilla'"),
        ("budgets=[1e13]", r"budgets: base\.budget is given too"),
        ("seeds=[1, 1]", "each value once"),
        ("base.data=text", "arm 'vanilla': data: must be a section"),
        ("base=text", "base: must be a section"),
        ("evaluation.suites=own", r"evaluation\.suites: must be a list"),
        ("evaluation.limit=ten", r"evaluation\.limit: must be a whole number \(given: 'ten'\)"),
        ("evaluation.suites=[perplexty]", "'perplexty' is unknown; did you mean 'perplexity'"),
        ("reference=''", "reference: there is no arm ''"),
        ("base.data.path=''", r"arm 'vanilla': data\.path: must not be empty"),
        ("base.budget.flops=1e30", r"arm 'vanilla': budget\.flops: would be .* steps"),
        ("budgets=[.inf]", r"budgets\.0: must be a finite number"),
        ("launch.ranks=1000000000000000000000000000000", r"launch\.ranks: must be less than or equal to"),
    ],
)
def test_an_override_of_the_wrong_kind_is_refused_with_its_place(override, message, write):
    tiny = "base:\n  model: {preset: tiny}\n  batch: {sequences: 2, micro_batch: 2, sequence_length: 32}\n"
    file = write(MINIMAL.replace("base:\n", tiny))
    with pytest.raises(RecipeError, match=message) as caught:
        plan_experiment(load_experiment(file, [override]))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("file", ["quickstart.yaml", "compare-360m.yaml"])
def test_the_projects_own_experiments_can_be_read(file):
    experiment = load_experiment(ROOT / "recipes" / file)
    assert isinstance(experiment, Experiment) and experiment.reference_arm == "vanilla"
