"""One trunk run gives a decayed model for every smaller budget, as if each had been trained alone."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.pretrain.support import Workers, losses, recipe_values, write_recipe


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
