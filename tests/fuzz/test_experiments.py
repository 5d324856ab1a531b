"""Experiment files: mutated as text and as values, and with mutated overrides."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.comparison.experiment import Experiment, load_experiment
from pretrain.comparison.planned_runs import PlannedRun, plan_experiment
from pretrain.recipe.yaml_input import parse_yaml, write_yaml
from tests.fuzz.recipes import FULL, PLAIN, override
from tests.fuzz.support import counts, drive, leaves, lost, mutate_text, mutate_values

Given = tuple[str, list[str]]
Used = tuple[Experiment, list[PlannedRun]]

SHARED = {key: value for key, value in PLAIN.items() if key not in ("name", "run_dir", "seed", "budget", "data")}
EXPERIMENTS: list[dict[str, Any]] = [
    {
        "name": "small",
        "title": "Small",
        "description": "Two arms.",
        "runs": "elsewhere",
        "data": {"corpus": "books/*.jsonl", "tokenizer": "train", "vocab_size": 300, "max_tokens": 1e6, "test": 0.02},
        "launch": {"launcher": "deepspeed", "ranks": 2},
        "base": {**SHARED, "seed": 1, "optim.eps": 1e-6},
        "arms": {
            "vanilla": {"model": {"sharing": "none", "recursions": 1, "router": None}},
            "mor": {"optim": {"lr": 2e-3}, "schedule.decay": 3},
        },
        "labels": {"mor": "MoR (R=3)"},
        "reference": "vanilla",
        "seeds": [1, 2],
        "budgets": [2e9, 1e9],
        "evaluation": {"suites": ["perplexity", "own"], "limit": 50, "text_bytes": 3000, "hub": True},
    },
    {
        "name": "mixed",
        "base": {**SHARED, "budget": {"steps": 12}, "data": {"sources": [{"path": "a"}, {"path": "b"}]}},
        "arms": {"plain": None, "other": {"batch.sequences": 4, "optim": FULL["optim"], "model.norm_eps": 1e-6}},
    },
]
TEXTS = [write_yaml(values) for values in EXPERIMENTS]


@pytest.fixture(autouse=True)
def _an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def use(given: Given) -> Used:
    text, overrides = given
    Path("experiment.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    experiment = load_experiment("experiment.yaml", overrides)
    return experiment, plan_experiment(experiment)


def changed(given: Given, used: Used) -> str | None:
    """What the file says is in the experiment, and what base and arm say in the recipe of every run of the arm."""
    values = parse_yaml(given[0], "the file")
    experiment, runs = used
    top = {key: value for key, value in values.items() if key not in ("base", "arms")}
    if (difference := lost(top, experiment.model_dump())) is not None:
        return difference
    for run in runs:
        arm = dotted(values["arms"][run.trial.arm] or {})
        # A single value in an arm replaces a whole section of the base.
        base = {
            place: value
            for place, value in dotted(values["base"]).items()
            if not any(place[: len(a)] == a for a in arm)
        }
        wanted = base | arm
        recipe = dotted(run.recipe.model_dump())
        for place, value in wanted.items():
            # A branch warms up with its trunk; with several seeds the base's is the first of them.
            elsewhere = place == ("seed",) or (run.trial.trunk is not None and place[:2] == ("schedule", "warmup"))
            difference = lost(value, recipe.get(place, ...))
            if not elsewhere and value != {} and difference is not None:
                return f"{run.trial.name}: {'.'.join(place)}: {difference}"
        if run.recipe.seed not in (values.get("seeds") or [wanted.get(("seed",), 0)]):
            return f"{run.trial.name}: seed {run.recipe.seed} is none of the file's"
    return None


def dotted(values: dict[str, Any]) -> dict[tuple[str, ...], Any]:
    return {tuple(".".join(path).split(".")): leaf for path, leaf in leaves(values).items() if path}


@pytest.mark.parametrize("text", TEXTS)
def test_the_experiments_that_are_mutated_are_accepted(text: str) -> None:
    assert changed((text, []), use((text, []))) is None


def as_values(source: random.Random) -> Given:
    return write_yaml(mutate_values(source.choice(EXPERIMENTS), source)), []


def as_text(source: random.Random) -> Given:
    return mutate_text(source.choice(TEXTS), source), []


@counts
@pytest.mark.parametrize(("make", "used"), [(as_values, 0.02), (as_text, 0.01)])
def test_experiments(count: int, make: Callable[[random.Random], Given], used: float) -> None:
    drive(count, make, use, changed=changed, used=used, refused=0.5)


@counts
def test_overrides_of_experiments(count: int) -> None:
    def make(source: random.Random) -> Given:
        number = source.randrange(len(EXPERIMENTS))
        return TEXTS[number], [override(EXPERIMENTS[number], source)]

    def kept(given: Given, used: Used) -> str | None:
        name, _, written = given[1][0].partition("=")
        value: Any = used[0].model_dump()
        for key in name.strip().split("."):
            value = value[key] if isinstance(value, dict) and key in value else ...
        given_value = parse_yaml(written, name)
        # An arm that differs in nothing is an empty one.
        return None if given_value is None and value == {} else lost(given_value, value)

    drive(count, make, use, seed="overrides", changed=kept, used=0.05, refused=0.25)
