"""A recipe is resolved once: network, plan, ZeRO stage, DeepSpeed JSON and data, for the run and for its branches."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.recipe.recipe import build_recipe
from pretrain.training.dry_run import describe
from pretrain.training.prepare import prepare, prepare_branch
from tests.pretrain.support import ALONE, recipe_values

CONSTRUCTIONS = {
    "pretrain.recipe.recipe.ModelConfig.from_dict": "network",
    "pretrain.recipe.plan.make_plan": "plan",
    "pretrain.training.zero_stage.choose_stage": "stage",
    "pretrain.recipe.deepspeed_json.resolve_ds_config": "DeepSpeed JSON",
    "pretrain.training.open_data.open_data": "data",
    "data_prep.reading.dataset.open_dataset": "shards",
}


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each value is built, wherever the function that builds it was imported to."""
    counts: Counter[str] = Counter()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            return function(*args, **options)

        return counted

    modules = [
        importlib.import_module(f"pretrain.{name}")
        for name in (
            *("recipe.recipe", "recipe.plan", "recipe.deepspeed_json", "records.finished", "checkpoints.branches"),
            *("training.prepare", "training.zero_stage", "training.open_data", "training.dry_run"),
        )
    ]
    for path, name in CONSTRUCTIONS.items():
        where, _, attribute = path.rpartition(".")
        if attribute == "from_dict":
            kind = modules[0].ModelConfig
            monkeypatch.setattr(kind, attribute, counting(name, kind.from_dict))
            continue
        original = getattr(importlib.import_module(where), attribute)
        wrapped = counting(name, original)
        for module in modules:
            if getattr(module, attribute, None) is original:
                monkeypatch.setattr(module, attribute, wrapped)
    return counts


@pytest.mark.parametrize("stage", ["zero3", "auto"])
def test_a_recipe_is_resolved_once(tmp_path: Path, tiny_data: Path, built: Counter[str], stage: str) -> None:
    values = recipe_values(tiny_data, tmp_path / "run", budget={"steps": 16, "branches": [8, 12]})
    values |= {"deepspeed": {"config": stage}, "schedule": {"kind": "wsd", "warmup": 2, "decay": 0.25}}
    run = prepare(build_recipe(values), ALONE)
    # The training and the validation split, each with its manifest once; the manifest is looked at for what there is.
    assert built == {"network": 1, "plan": 1, "stage": 1, "DeepSpeed JSON": 1, "data": 1, "shards": 3}
    built.clear()
    describe(run, ALONE)
    assert not built
    for branch in run.parts[1:]:
        shorter = prepare_branch(run, branch)
        assert shorter.plan.steps == branch.steps and shorter.folder.path == branch.folder.path
    assert built == {"plan": 2}, "a branch has a plan of its own and everything else from its trunk"
