from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.comparison.experiment import Experiment, load_experiment
from pretrain.errors import RecipeError

ROOT = Path(__file__).resolve().parents[2]

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
    branch, trunk = experiment.recipe_values(trials[1]), experiment.recipe_values(trials[3])
    assert trunk["budget"] == {"flops": 2.5e13, "branches": [1e13]} and branch["budget"] == {"flops": 1e13}
    assert trunk["seed"] == branch["seed"] == 4


def test_budgets_are_runs_of_their_own_without_a_decay_to_branch(write):
    text = MINIMAL.replace("  budget: {flops: 1e13}\n", "  schedule.kind: cosine\n") + "budgets: [1e13, 2.5e13]\n"
    experiment = load_experiment(write(text))
    assert [trial.name for trial in experiment.trials()] == ["vanilla-1e13", "mor-1e13", "vanilla-2.5e13", "mor-2.5e13"]
    assert all(trial.trunk is None for trial in experiment.trials())
    assert experiment.recipe_values(experiment.trials()[0])["budget"] == {"flops": 1e13}


def test_a_mixture_of_sources_is_left_as_it_is(write):
    text = MINIMAL.replace("base:\n", "base:\n  data: {sources: [{path: a}, {path: b}]}\n")
    experiment = load_experiment(write(text))
    assert experiment.recipe_values(experiment.trials()[0])["data"] == {"sources": [{"path": "a"}, {"path": "b"}]}


def test_a_run_keeps_its_folder_when_seeds_are_added(write):
    before = load_experiment(write(MINIMAL)).trials()
    after = load_experiment(write(MINIMAL + "seeds: [3, 4, 5]\n")).trials()
    assert {trial.folder for trial in before} < {trial.folder for trial in after}


def test_overrides_are_applied_before_checking(write):
    experiment = load_experiment(write(MINIMAL), ["data.corpus=books/*.jsonl", "base.optim.lr=5e-4", "runs=elsewhere"])
    assert experiment.data.corpus == "books/*.jsonl"
    assert experiment.recipe_values(experiment.trials()[0])["optim"]["lr"] == 5e-4
    assert experiment.trials()[0].folder == Path("elsewhere/vanilla")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("evalutaion: {suites: [own]}", ["evalutaion", "did you mean 'evaluation'?"]),
        ("evaluation: {suits: [own]}", ["evaluation.suits", "did you mean 'evaluation.suites'?"]),
        ("launch: {rank: 2}", ["launch.rank", "did you mean 'launch.ranks'?"]),
        ("launch: {launcher: python, ranks: 2}", ["launch", "one process, not 2"]),
        ("reference: vanila", ["vanila", "did you mean 'vanilla'?"]),
        ("labels: {mr: MoR}", ["mr", "did you mean 'mor'?"]),
        ("budgets: [1e13]", ["budgets", "base.budget is given too"]),
        ("seeds: [1, 1]", ["each value once"]),
        ("seeds: [one]", ["seeds.0"]),
        ("name: other", ["stands twice"]),
        ("data: {path: a}\nbase: {data.path: b}", ["stands twice"]),
    ],
)
def test_a_wrong_experiment_is_refused_in_one_sentence(write, change, words):
    with pytest.raises(RecipeError) as caught:
        load_experiment(write(MINIMAL + change + "\n"))
    for word in words:
        assert word in str(caught.value)
    assert caught.value.args[0].startswith(str(write(MINIMAL))) and "Traceback" not in str(caught.value)


@pytest.mark.parametrize("name", ["report", "a/b", "-x"])
def test_an_arm_must_be_a_folder_name_of_its_own(write, name):
    with pytest.raises(RecipeError, match="arms"):
        load_experiment(write(MINIMAL.replace("  vanilla:", f"  {name}:")))


def test_a_missing_file_and_a_missing_arm_are_named(write, tmp_path):
    with pytest.raises(RecipeError, match=r"nothing\.yaml: no such experiment"):
        load_experiment(tmp_path / "nothing.yaml")
    with pytest.raises(RecipeError, match="did you mean 'mor'"):
        load_experiment(write(MINIMAL)).trials(["mro"])


def test_overrides_without_a_value_are_refused(write):
    with pytest.raises(RecipeError, match=r"section\.key=value"):
        load_experiment(write(MINIMAL), ["data.corpus"])


@pytest.mark.parametrize("file", ["quickstart.yaml", "compare-360m.yaml"])
def test_the_projects_own_experiments_can_be_read(file):
    experiment = load_experiment(ROOT / "recipes" / file)
    assert isinstance(experiment, Experiment) and experiment.reference_arm == "vanilla"
