"""Is this run finished? The answer from run folders that a test writes, at every budget a recipe may ask for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pretrain.cluster.locate import main as locate
from pretrain.errors import RunError
from pretrain.recipe.recipe import Recipe, build_recipe
from pretrain.records.finished import FREE, begun_with, parts, unfinished
from tests.pretrain.support import ROOT, recipe_values, tiny_model, write_recipe

WSD = {"kind": "wsd", "warmup": 2, "decay": 0.25}


def recipe(tmp_path: Path, steps: int = 16, branches: tuple[int, ...] = (), **changes: Any) -> Recipe:
    values = {"budget": {"steps": steps, "branches": list(branches)}, "schedule": WSD, "model": tiny_model("vanilla")}
    return build_recipe(recipe_values(tmp_path / "data", tmp_path / "run", **{**values, **changes}))


def leave(run: Recipe, **states: str) -> None:
    """Run folders as training leaves them: states by the names of branches, `trunk` for the trunk."""
    for part in parts(run):
        if state := states.get(f"branch{part.name}" if part.name else "trunk"):
            folder = part.folder
            folder.write_text(folder.recipe_file, part.recipe.to_yaml())
            folder.write_json(folder.status_file, {"state": state, "step": part.steps, "steps": part.steps})


def names(run: Recipe) -> list[str | None]:
    return [part.name for part in unfinished(run)]


def test_a_run_is_its_trunk_and_all_its_branches(tmp_path):
    run = recipe(tmp_path, branches=(8, 12))
    assert [(part.name, part.start, part.steps) for part in parts(run)] == [(None, 0, 16), ("8", 6, 8), ("12", 9, 12)]
    assert names(run) == [None, "8", "12"]
    leave(run, trunk="finished", branch8="finished", branch12="stopped")
    assert names(run) == ["12"]
    leave(run, branch12="finished")
    assert names(run) == []


@pytest.mark.parametrize(
    "changes",
    [{"steps": 24}, {"steps": 12}, {"schedule": {**WSD, "decay": 0.5}}, {"steps": 24, "branches": (12, 16)}],
    ids=str,
)
def test_it_is_finished_at_the_budget_and_schedule_that_the_recipe_has_now(tmp_path, changes):
    run = recipe(tmp_path)
    leave(run, trunk="finished")
    assert names(run) == []
    assert None in names(recipe(tmp_path, **changes))


def test_a_branch_with_another_decay_is_not_the_recipes_branch(tmp_path):
    before = recipe(tmp_path, branches=(8,))
    leave(before, trunk="finished", branch8="finished")
    now = recipe(tmp_path, branches=(8,), schedule={**WSD, "decay": 0.5})
    leave(now, trunk="finished")  # as a kill leaves it that comes before the branch
    assert names(now) == ["8"]


def test_what_a_start_has_chosen_and_what_may_differ_is_no_difference(tmp_path):
    leave(recipe(tmp_path, precision="bf16"), trunk="finished")
    now = {"precision": "auto", "logging": {"every": 7}, "deepspeed": {"config": "auto"}}
    assert names(recipe(tmp_path, **now)) == []
    now["data"] = {"sources": [{"path": str(tmp_path / "data")}]}
    assert names(recipe(tmp_path, **now)) == [None]
    leave(recipe(tmp_path, precision="bf16", data=now["data"]), trunk="finished")
    now["data"] = {"sources": [{"path": str(tmp_path / "elsewhere" / "data")}], "verify": "checksums"}
    assert names(recipe(tmp_path, **now)) == []


def test_the_documentation_names_what_may_change(tmp_path):
    rows = [line.split("|") for line in (ROOT / "docs" / "training.md").read_text(encoding="utf-8").splitlines()]
    allowed = [row[1] for row in rows if len(row) == 4 and row[2].strip().startswith("allowed")]
    assert sorted(re.findall("`(.+?)`", "".join(allowed))) == sorted(FREE)


def test_another_run_in_the_folder_is_not_this_one(tmp_path):
    leave(recipe(tmp_path, seed=1), trunk="finished")
    other = recipe(tmp_path, seed=2)
    assert names(other) == [None]
    with pytest.raises(RunError, match="holds a run with seed = 1, but the recipe now says 2"):
        begun_with(other)


@pytest.mark.parametrize("status", ["[]", "{}", '{"state": 1}', '{"state": "finished", "steps": "16"}', "[" * 9, ""])
def test_a_damaged_folder_is_not_finished(tmp_path, status):
    run = recipe(tmp_path)
    leave(run, trunk="finished")
    (tmp_path / "run" / "status.json").write_text(status)
    assert names(run) == [None]
    leave(run, trunk="finished")
    (tmp_path / "run" / "recipe.yaml").write_text("{")
    assert names(run) == [None]


def test_a_batch_script_is_told_where_the_run_is_and_whether_it_is_finished(tmp_path, capsys):
    run = recipe(tmp_path, branches=(8,))
    file = write_recipe(tmp_path / "recipe.yaml", run.model_dump(mode="json"))
    for states, overrides, finished in (
        ({"trunk": "finished"}, (), False),
        ({"branch8": "finished"}, (), True),
        ({}, ("budget.steps=24",), False),
    ):
        leave(run, **states)
        assert locate([str(file), *overrides]) == 0
        assert json.loads(capsys.readouterr().out) == {"run": str(tmp_path / "run"), "finished": finished}
