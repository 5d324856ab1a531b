"""One trunk run gives a decayed model for every smaller budget, as if each had been trained alone."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoints.branches import Extension, common_steps, extend
from pretrain.errors import RecipeError
from pretrain.recipe.plan import make_plan
from pretrain.recipe.recipe import build_recipe, load_recipe
from pretrain.records.run_folder import RunFolder
from pretrain.training.open_data import OpenedData, open_data
from tests.pretrain.checkpoints.test_resume import assert_same_run, progress
from tests.pretrain.support import (
    Job,
    Nursery,
    Workers,
    losses,
    make_dataset,
    metrics,
    recipe_values,
    train,
    write_recipe,
)


def test_a_branch_is_the_run_that_its_budget_alone_would_have_been(
    tmp_path: Path, tiny_data: Path, two_ranks: Workers
) -> None:
    schedule = {"kind": "wsd", "warmup": 2, "decay": 0.25}
    shared = {"schedule": schedule, "checkpoint": {"every": 5, "keep": 1}, "evaluation": {"every": 4, "sequences": 2}}
    values = recipe_values(tiny_data, tmp_path / "trunk", budget={"steps": 16, "branches": [8, 12]}, **shared)
    trunk = two_ranks.train(tmp_path, values)
    for steps in (8, 12):
        alone = recipe_values(tiny_data, tmp_path / f"alone{steps}", budget={"steps": steps}, **shared)
        expected = two_ranks.train(tmp_path, alone)
        branch = trunk / "branches" / str(steps)
        assert losses(branch) == losses(expected)
        mine, theirs = (
            load_file(branch / "weights/model.safetensors"),
            load_file(expected / "weights/model.safetensors"),
        )
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        assert json.loads((branch / "plan.json").read_text(encoding="utf-8"))["steps"] == steps
    assert len(losses(trunk)) == 16
    assert losses(trunk)[12] != losses(trunk / "branches" / "12")[12], "the trunk does not decay there"
    before = (trunk / "branches" / "8" / "metrics.jsonl").read_bytes()
    code, printed = two_ranks.run("--config", str(write_recipe(tmp_path / "again.yaml", values)))
    assert code == 0 and "already finished" in printed
    assert (trunk / "branches" / "8" / "metrics.jsonl").read_bytes() == before


def test_a_larger_budget_goes_on_from_where_the_decay_began(
    tmp_path: Path, tiny_data: Path, two_ranks: Workers
) -> None:
    """12 steps, finished; then 20 with the old end as a branch: the run that 20 would have been from the start."""
    shared = {"checkpoint": {"every": 5, "keep": 9}, "evaluation": {"every": 4, "sequences": 2}}
    values = recipe_values(tiny_data, tmp_path / "run", budget={"steps": 12}, **shared)
    run = two_ranks.train(tmp_path, values)
    first = tmp_path / "first"
    shutil.copytree(run, first)
    larger = {**values, "budget": {"steps": 20, "branches": [10, 12]}}
    code, printed = two_ranks.run("--config", str(write_recipe(tmp_path / "larger.yaml", larger)))
    assert code == 0 and "going on from step 8" in printed and "branches/12" in printed, printed
    assert "resuming at step 8 of 20" in printed
    whole = two_ranks.train(tmp_path, {**larger, "run_dir": str(tmp_path / "whole")})
    assert_same_run(run, whole)
    # Not on from step 6, where the branch of 10 leaves: 5 is the last checkpoint up to there.
    assert_same_run(run / "branches" / "10", whole / "branches" / "10")
    assert_same_run(run / "branches" / "12", first)
    starts = [record["step"] for record in metrics(run / "branches" / "12", "event") if record["event"] == "started"]
    assert starts == [0], "what was finished is not trained again"
    again, printed = two_ranks.run("--config", str(tmp_path / "larger.yaml"))
    assert again == 0 and "already finished" in printed


def test_a_budget_that_changes_earlier_steps_is_refused(tmp_path: Path, tiny_data: Path, one_rank: Workers) -> None:
    values = recipe_values(tiny_data, tmp_path / "run", budget={"steps": 10}, checkpoint={"every": 3})
    values["schedule"] = {"kind": "wsd", "warmup": 0.5, "decay": 2}
    run = one_rank.train(tmp_path, values)
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}

    def refused(**changes: object) -> str:
        code, printed = one_rank.run("--config", str(write_recipe(tmp_path / "r.yaml", {**values, **changes})))
        assert code == 2 and printed.count("\n") == 1, printed
        assert {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()} == before
        return printed

    assert "from step 1 on" in (printed := refused(budget={"steps": 20})) and "schedule.warmup to 5" in printed
    assert "from step 7 on" in refused(budget={"steps": 10}, schedule={"kind": "cosine", "warmup": 5})
    early = {"budget": {"steps": 10, "branches": [9]}, "schedule": {"kind": "wsd", "warmup": 5, "decay": 2}}
    assert "the branch 9 leaves the trunk after 7 steps" in refused(**early), "8 is the first checkpoint kept"


@pytest.mark.parametrize("killed_at", ["writing the branch", "removing"])
def test_going_back_can_be_killed_and_repeated(
    tmp_path: Path, tiny_data: Path, one_rank: Workers, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    run = one_rank.train(tmp_path, recipe_values(tiny_data, tmp_path / "run", checkpoint={"every": 5, "keep": 9}))
    weights = load_file(run / "weights/model.safetensors")
    folder = RunFolder(run)
    extension = Extension(load_recipe(folder.recipe_file), 8)
    name = "rename" if killed_at == "writing the branch" else "unlink"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, name, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        extend(folder, extension)
    assert "branches/12" in extend(folder, extension)
    assert sorted(entry.name for entry in folder.checkpoints.glob("step-*")) == ["step-00000005", "step-00000008"]
    assert (folder.checkpoints / "latest").read_text(encoding="utf-8") == "step-00000008\n"
    assert not folder.status_file.exists() and not folder.weights.exists()
    kept = run / "branches" / "12"
    assert json.loads((kept / "status.json").read_text(encoding="utf-8"))["state"] == "finished"
    assert all(
        torch.equal(value, weights[name]) for name, value in load_file(kept / "weights/model.safetensors").items()
    )
    assert sorted(entry.name for entry in (kept / "checkpoints").glob("step-*")) == ["step-00000010", "step-00000012"]


def test_weights_change_at_the_step_that_the_recipe_names(tmp_path: Path, tiny_data: Path) -> None:
    """Drawn from one source, then from both, then from the other; also while the batch is still growing."""

    def opened(**changes: Any) -> OpenedData:
        sources = [{"path": str(tiny_data), "name": "web"}, {"path": str(tiny_data), "name": "code", "weight": 0.0}]
        values = recipe_values(tiny_data, tmp_path / "run", data={"sources": sources, **changes.pop("data")}, **changes)
        recipe = build_recipe(values)
        return open_data(recipe, make_plan(recipe))

    phases = [{"start": 3, "weights": {"web": 1.0, "code": 1.0}}, {"start": 0.5, "weights": {"code": 1.0}}]
    source = opened(data={"phases": phases}).source
    assert source.drawn(3 * 8) == {"web": 24, "code": 0}
    assert source.drawn(6 * 8) == {"web": 36, "code": 12}
    assert source.drawn(12 * 8) == {"web": 36, "code": 60}
    growing = {"sequences": 8, "micro_batch": 2, "sequence_length": 32, "warmup_from": 2, "warmup": 4}
    source = opened(data={"phases": phases[:1]}, batch=growing).source
    assert source.drawn(2 + 2 + 4) == {"web": 8, "code": 0} and source.drawn(2 + 2 + 4 + 2)["code"] == 1
    with pytest.raises(RecipeError, match="no source is called 'cod'; did you mean 'code'"):
        opened(data={"phases": [{"start": 3, "weights": {"cod": 1.0}}]})
    with pytest.raises(RecipeError, match="must ascend"):
        opened(data={"phases": phases[::-1]})
    with pytest.raises(RecipeError, match=r"start of data\.phases in steps"):
        opened(data={"phases": phases}, budget={"steps": 12, "branches": [10]})


def test_what_two_budgets_have_in_common(tmp_path: Path) -> None:
    """Up to the first step whose learning rate, batch or data differ."""
    sources = [{"path": "a", "name": "a"}, {"path": "b", "name": "b", "final_weight": 3.0}]

    def common(first: dict[str, Any], second: dict[str, Any]) -> int:
        before, now = (build_recipe(recipe_values(tmp_path, tmp_path, **changes)) for changes in (first, second))
        return common_steps(before, now, make_plan(now))

    short, long = {"budget": {"steps": 12}}, {"budget": {"steps": 20}}
    # The fall begins after step 8, with a ninth step that is still at the peak.
    assert common(short, long) == common(long, short) == 9
    share = {"schedule": {"kind": "constant", "warmup": 0.5}}
    assert common({**short, **share}, {**long, **share}) == 0
    constant = {"schedule": {"kind": "constant", "warmup": 2}}
    assert common({**short, **constant}, {**long, **constant}) == 12
    assert common({**short, **constant}, long) == 12, "neither decays before the shorter one's end"
    mixed = {**constant, "data": {"sources": sources, "anneal": 5}}
    assert common({**short, **mixed}, {**long, **mixed}) == 7
    late = {**constant, "data": {"sources": sources, "phases": [{"start": 0.5, "weights": {"a": 1.0}}]}}
    assert common({**short, **late}, {**long, **late}) == 6


@pytest.mark.slow
def test_killed_within_its_branches_a_run_ends_as_the_undisturbed_one(tmp_path: Path, nursery: Nursery) -> None:
    """At a branch's very beginning, and while it decays."""
    shared = {"checkpoint": {"every": 2, "keep": 2}, "evaluation": {"every": 5, "sequences": 4}}
    data = make_dataset(tmp_path / "data")
    values = recipe_values(data, tmp_path / "whole", budget={"steps": 20, "branches": [10, 14]}, **shared)
    train(write_recipe(tmp_path / "whole.yaml", values), ranks=2, nursery=nursery)
    run = tmp_path / "run"
    recipe = write_recipe(tmp_path / "r.yaml", {**values, "run_dir": str(run)})
    for branch, step in (("10", 8), ("14", 0), ("14", 12)):
        job = Job(recipe, ranks=2, nursery=nursery)
        place = run / "branches" / branch
        while job.running and not (place.exists() and progress(place) >= step):
            time.sleep(0.002)
        job.kill(rank=1 if step else None)
        assert all(code != 0 for code in job.wait(timeout=60)[0])
    train(recipe, ranks=2, nursery=nursery)
    for place in ("", "branches/10", "branches/14"):
        assert_same_run(run / place, tmp_path / "whole" / place)
