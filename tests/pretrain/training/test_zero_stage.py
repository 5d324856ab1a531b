"""`deepspeed.config: auto` takes the lowest ZeRO stage that fits, alike on all ranks, and keeps it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from pretrain.errors import RecipeError
from pretrain.recipe.recipe import build_recipe, load_recipe
from pretrain.training.zero_stage import _USABLE_ON_GPU, StageChoice, _group_limits, choose_stage, device_memory
from tests.pretrain.support import (
    ALONE,
    ROOT,
    Job,
    Nursery,
    Workers,
    losses,
    metrics,
    recipe_values,
    tiny_model,
    write_recipe,
)

FOUR = replace(ALONE, world_size=4)
# 2 layers: attention 4 x 1024 x 1024, feed-forward 3 x 1024 x 4096, two norms; embedding 64 x 1024, a norm.
WIDE = tiny_model(
    "vanilla", hidden_size=1024, num_heads=8, num_kv_heads=8, intermediate_size=4096, num_layers=2, tie_embeddings=True
)
PARAMETERS = 2 * (4 * 1024**2 + 3 * 1024 * 4096 + 2 * 1024) + 64 * 1024 + 1024


def chosen(memory: float, folder: Path = Path("nowhere"), ranks: Any = FOUR, **changes: Any) -> StageChoice:
    """The choice for a GPU whose usable part is `memory`."""
    batch = {"sequences": 16, "micro_batch": 2, "sequence_length": 32}
    usual = {"deepspeed": {"config": "auto"}, "model": WIDE, "batch": batch}
    values = recipe_values(Path("data"), folder, **{**usual, **changes})
    recipe = build_recipe(values)
    return choose_stage(recipe, ranks, memory=int(memory / _USABLE_ON_GPU), on_cpu=False)


def test_the_lowest_stage_that_fits_is_chosen() -> None:
    """By the arithmetic of Rajbhandari et al. 2020, section 3: in fp32 on four ranks a parameter takes 4 + 4 + 8 bytes
    at stage 0, and 4 + 4 + 12/4, 4 + 4/4 + 12/4, 4/4 + 4/4 + 12/4 at the others. Of a network of two layers a gradient
    on its way is a quarter of 4 bytes more, and a bucket of two layers, beyond stage 0, 4 more.
    """
    assert chosen((16 + 1.5) * PARAMETERS).config == "zero0"
    assert chosen((11 + 4 + 1.5) * PARAMETERS).config == "zero1"
    assert chosen((8 + 4 + 1.5) * PARAMETERS).config == "zero2"
    with pytest.raises(RecipeError, match=r"no ZeRO stage fits.*zero3: about.*micro_batch.*zero3_offload_optimizer"):
        chosen(12 * PARAMETERS)


def test_the_highest_stage_is_for_networks_that_are_never_gathered_as_a_whole() -> None:
    """3.2e9 parameters in bf16 with fp32 gradients: 2 + 4/4 + 12/4 bytes each at stage 2 and 2/4 + 4/4 + 12/4 at stage
    3, and a copy of the gradients in an update, 4/4.
    """
    model = {**WIDE, "hidden_size": 4096, "intermediate_size": 16384, "num_layers": 12}
    count = 12 * (4 * 4096**2 + 3 * 4096 * 16384)
    batch = {"sequences": 16, "micro_batch": 1, "sequence_length": 32}
    assert chosen(7.1 * count, model=model, precision="bf16", batch=batch).config == "zero2"
    assert chosen(5.7 * count, model=model, precision="bf16", batch=batch).config == "zero3"


def test_every_stage_that_was_looked_at_is_told() -> None:
    choice = chosen(15 * PARAMETERS)
    assert choice.automatic and choice.reason.startswith("auto: the lowest stage that fits into")
    zero0, zero1, zero2 = choice.considered
    assert zero0.startswith("zero0: about") and zero0.endswith("too much")
    assert zero1.endswith("too much") and zero2.endswith("a rank")


@pytest.mark.parametrize(("micro_batch", "config"), [(2, "zero1"), (1, "zero2")])
def test_precision_decides_before_memory(micro_batch: int, config: str) -> None:
    """bf16 has no master weights at stage 0, and at stage 1 rounds the sum over several micro-batches."""
    batch = {"sequences": 8, "micro_batch": micro_batch, "sequence_length": 32}
    choice = chosen(1e15, precision="bf16", batch=batch)
    assert choice.config == config
    assert "refused" in choice.considered[0] and ("refused" in choice.considered[1]) == (config == "zero2")


def test_what_is_wrong_at_every_stage_is_told_as_it_is() -> None:
    with pytest.raises(RecipeError, match=r"batch\.sequences: 16 is not micro_batch"):
        chosen(1e15, ranks=replace(ALONE, world_size=3))


def test_a_stage_that_is_named_is_not_questioned() -> None:
    recipe = build_recipe(recipe_values(Path("data"), Path("run")))
    choice = choose_stage(recipe, ALONE, memory=1, on_cpu=True)
    assert (choice.config, choice.automatic, choice.reason) == ("zero3", False, "as the recipe says")


def test_a_run_keeps_its_stage_on_other_hardware(tmp_path: Path) -> None:
    begun = build_recipe(recipe_values(Path("data"), tmp_path, deepspeed={"config": "zero2"}, model=WIDE))
    (tmp_path / "recipe.yaml").write_text(begun.to_yaml(), encoding="utf-8")
    roomy = chosen(1e15, tmp_path)
    assert (roomy.config, roomy.warning) == ("zero2", None)
    cramped = chosen(PARAMETERS, tmp_path)
    assert cramped.config == "zero2" and cramped.warning is not None
    assert "began with zero2" in cramped.warning and "checkpoint.weights_only" in cramped.warning


def test_ranks_take_the_stage_of_the_one_with_the_least_memory(
    tmp_path: Path, tiny_data: Path, nursery: Nursery
) -> None:
    values = recipe_values(tiny_data, tmp_path / "run", deepspeed={"config": "auto"}, budget={"steps": 4})
    values["schedule"] = {"kind": "constant", "warmup": 0}
    fault = {"FAULT": json.dumps({"rank": 1, "stage": "zero2"})}
    script = ROOT / "tests" / "pretrain" / "faulty.py"
    job = Job(write_recipe(tmp_path / "r.yaml", values), ranks=2, extra=fault, script=script, nursery=nursery)
    codes, output, errors = job.wait()
    assert codes == [0, 0], output + errors
    assert load_recipe(tmp_path / "run" / "recipe.yaml").deepspeed.config == "zero2"
    started = metrics(tmp_path / "run", "event")[0]
    reason = "auto: rank 1 has the least memory"
    assert started["zero_stage"].startswith("2") and started["zero_stage_reason"] == reason
    assert reason in output + errors


def test_a_dry_run_tells_the_choice_and_a_begun_run_keeps_its_stage(
    tmp_path: Path, tiny_data: Path, one_rank: Workers
) -> None:
    values = recipe_values(tiny_data, tmp_path / "run", deepspeed={"config": "auto"})
    file = write_recipe(tmp_path / "r.yaml", values)
    code, printed = one_rank.run("--config", str(file), "--dry-run")
    assert code == 0, printed
    assert "0: every rank holds everything (auto: the lowest stage" in printed and "zero0: about" in printed
    code, printed = one_rank.run("--config", str(file), "deepspeed.config=zero2", "limits.wall_clock_hours=1e-9")
    assert code != 0 and "ZeRO stage 2" in printed and "as the recipe says" in printed, printed
    code, printed = one_rank.run("--config", str(file))
    assert code == 0 and "auto: the run began with it" in printed, printed
    assert [e["zero_stage"][0] for e in metrics(tmp_path / "run", "event") if e["event"] == "started"] == ["2", "2"]
    assert sorted(losses(tmp_path / "run")) == list(range(1, 13))


def test_memory_of_a_cpu_rank_is_its_share_of_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.training.zero_stage._group_limits", lambda: [6000, 4000])
    assert device_memory(replace(ALONE, local_world_size=4), on_cpu=True) == 1000
    monkeypatch.setattr("pretrain.training.zero_stage._group_limits", lambda: [])
    available = psutil.virtual_memory().available
    assert device_memory(replace(ALONE, local_world_size=2), on_cpu=True) == pytest.approx(available / 2, rel=0.2)


def test_limits_of_control_groups_are_found(tmp_path: Path) -> None:
    def limit(file: str, text: str) -> None:
        path = tmp_path / "sys" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")

    groups = tmp_path / "cgroup"
    limit("slurm/job_7/memory.max", "8000\n")
    limit("slurm/job_7/step_0/memory.max", "max\n")
    limit("slurm/other/memory.max", "1\n")
    groups.write_text("0::/slurm/job_7/step_0\n", encoding="utf-8")
    assert _group_limits(groups, tmp_path / "sys") == [8000]
    limit("memory/slurm/memory.limit_in_bytes", "700\n")
    limit("memory/memory.limit_in_bytes", "9223372036854771712\n")
    groups.write_text("3:cpu:/slurm\n4:memory:/slurm\n0::/\n", encoding="utf-8")
    assert min(_group_limits(groups, tmp_path / "sys")) == 700
    assert _group_limits(tmp_path / "absent") == []
