"""The DeepSpeed JSON is checked key by key at every level, and against the recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import BaseModel

import ds_configs
from mor_model.presets import preset
from pretrain.errors import RecipeError
from pretrain.recipe.deepspeed_json import (
    choose_settings,
    complete,
    explain,
    load_ds_config,
    resolve_ds_config,
    zero_stage,
)
from pretrain.recipe.deepspeed_keys import FROM_THE_RECIPE, check_ds_config, ds_file
from pretrain.recipe.messages import below, forms, keys_of
from pretrain.recipe.recipe import Recipe, build_recipe
from tests.pretrain.support import recipe_values


def recipe(**changes: Any) -> Recipe:
    return build_recipe(recipe_values(Path("data"), Path("run"), **changes))


@pytest.mark.parametrize("name", ds_configs.names())
def test_every_shipped_configuration_is_accepted(name: str) -> None:
    values = load_ds_config(name)
    check_ds_config(values)
    assert str(zero_stage(values)) in name or name == "zeropp"


@pytest.mark.parametrize(
    ("values", "path", "near"),
    [
        ({"zero_optimisation": {}}, "zero_optimisation", "zero_optimization"),
        ({"gradient_cliping": 1.0}, "gradient_cliping", "gradient_clipping"),
        ({"bf_16": {}}, "bf_16", "bf16"),
        ({"zero_optimization": {"stages": 3}}, "zero_optimization.stages", "stage"),
        ({"zero_optimization": {"overlap_com": True}}, "zero_optimization.overlap_com", "overlap_comm"),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            "zero_optimization.offload_optimizer.devise",
            "device",
        ),
        ({"fp16": {"initial_scale_pow": 3}}, "fp16.initial_scale_pow", "initial_scale_power"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "data_types.grad_acum_dtype", "grad_accum_dtype"),
        ({"aio": {"blok_size": 1}}, "aio.blok_size", "block_size"),
        ({"flops_profiler": {"enable": True}}, "flops_profiler.enable", "enabled"),
        ({"timers": {"throughput": {"enable": True}}}, "timers.throughput.enable", "enabled"),
        ({"checkpoint": {"tag_validaton": "Warn"}}, "checkpoint.tag_validaton", "tag_validation"),
    ],
)
def test_an_unknown_key_is_refused_at_every_level(values: dict[str, Any], path: str, near: str) -> None:
    with pytest.raises(RecipeError, match=rf"unknown key '{path}'; did you mean '{path.rpartition('.')[0]}.?{near}'"):
        check_ds_config(values)


def test_every_key_of_every_shipped_configuration_matters() -> None:
    """Misspelling any key of any shipped file, at any depth, is noticed."""

    def misspellings(values: dict[str, Any]) -> list[dict[str, Any]]:
        found = []
        for key, value in values.items():
            rest = {other: kept for other, kept in values.items() if other != key}
            found.append({**rest, key + "x": value})
            if isinstance(value, dict):
                found += [{**rest, key: inner} for inner in misspellings(value)]
        return found

    for name in ds_configs.names():
        for wrong in misspellings(load_ds_config(name)):
            with pytest.raises(RecipeError, match="unknown key"):
                check_ds_config(wrong)


@pytest.mark.parametrize(
    "values",
    [
        {"zero_optimization": {"stage": 5}},
        {"zero_optimization": {"stage": "three"}},
        {"zero_optimization": {"reduce_bucket_size": -1}},
        {"zero_optimization": {"offload_optimizer": {"device": "tape"}}},
        {"zero_optimization": 3},
        {"bf16": True},
        {"train_batch_size": "8"},
        {"train_batch_size": True},
        {"gradient_clipping": "1"},
        {"wall_clock_breakdown": 1},
        {"optimizer": {"type": "AdamW"}},
        {"scheduler": {"type": "WarmupLR"}},
        {"wandb": {"enabled": True}},
        {"fp16": {"loss_scale": -1}},
        {"bf16": "auto"},
        {"fp16": None},
        {"zero_optimization": {"stage": "3"}},
        {"zero_optimization": {"stage": True}},
        {"zero_optimization": {"reduce_bucket_size": "500000000"}},
        {"zero_optimization": {"reduce_bucket_size": 1e999}},
        {"zero_optimization": {"reduce_bucket_size": 10**400}},
        {"zero_optimization": {"overlap_comm": "yes"}},
        {"zero_optimization": {"offload_optimizer": "cpu"}},
        {"zero_optimization": {"offload_optimizer": {"nvme_path": 3}}},
        {"zero_optimization": {"leaf_module": 3}},
        {"zero_optimization": {"cpu_offload": True}},
        {"zero_optimization": {"prefetch_bucket_size": 1, "stage3_prefetch_bucket_size": 2}},
        {"data_types": {"grad_accum_dtype": 32}},
        {"data_types": {"grad_accum_dtype": "fp8"}},
        {"data_types": "fp32"},
        {"aio": {"block_size": "1M"}},
        {"timers": {"throughput": "on"}},
        {"checkpoint": {"tag_validation": "Maybe"}},
        {"communication_data_type": "fp8"},
        {"torch_autocast": {"dtype": "float16"}},
        {"steps_per_print": 0},
        {"gradient_clipping": float("nan")},
    ],
)
def test_a_wrong_value_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(values))):
        check_ds_config(values)


def leaves(section: type[BaseModel], above: str = "") -> list[str]:
    """Dotted names of all keys that hold a single value."""
    found = []
    for name in keys_of(section):
        inner = [kind for kind in forms(below(section, name)) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        found += leaves(inner[0], f"{above}{name}.") if inner else [f"{above}{name}"]
    return found


def nested(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


@pytest.mark.parametrize("path", sorted(FROM_THE_RECIPE))
@pytest.mark.parametrize("stage", [1, 3])
def test_auto_is_what_the_recipe_or_the_network_makes_of_it(path: str, stage: int) -> None:
    wanted = recipe(precision="bf16")
    plain = {"zero_optimization": {"stage": stage}}
    given = nested(path, "auto")
    given["zero_optimization"] = plain["zero_optimization"] | given.get("zero_optimization", {})
    assert resolve_ds_config(wanted, 2, given) == resolve_ds_config(wanted, 2, plain)


def test_what_transformers_writes_is_refused_at_the_key_that_nothing_decides(tmp_path: Path) -> None:
    """The configuration of its documentation, less the optimiser's sections."""
    values = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 1e9,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9,
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }
    file = tmp_path / "theirs.json"
    file.write_text(json.dumps(values), encoding="utf-8")
    theirs = recipe(deepspeed={"config": str(file)})
    place = "zero_optimization.stage3_param_persistence_threshold"
    with pytest.raises(RecipeError, match=rf"{place}: .*'auto'.*default \(100,000\), or give a whole"):
        resolve_ds_config(theirs, 2)
    del values["zero_optimization"]["stage3_param_persistence_threshold"]
    file.write_text(json.dumps(values), encoding="utf-8")
    resolved = resolve_ds_config(theirs, 2)
    assert (resolved["train_batch_size"], resolved["gradient_clipping"]) == (8, 1.0)
    assert "auto" not in json.dumps(resolved) and resolved["zero_optimization"]["sub_group_size"] == 1e9
    assert explain(resolved["zero_optimization"], theirs.network)[0].startswith("reduce_bucket_size 5,000,000: grad")


def test_auto_is_refused_at_every_other_key() -> None:
    others = [path for path in leaves(ds_file()) if path not in FROM_THE_RECIPE]
    # ZenFlow's own way to leave an interval to it.
    own = {f"zero_optimization.zenflow.{key}" for key in ("select_strategy", "select_interval", "update_interval")}
    assert len(others) > 100 and own < set(others)
    for path in others:
        if path in own:
            check_ds_config(nested(path, "auto"))
        else:
            with pytest.raises(RecipeError, match=rf"{path}\b"):
                check_ds_config(nested(path, "auto"))


def test_a_shipped_name_is_the_shipped_file_whatever_the_working_directory_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero3").mkdir()
    (tmp_path / "zero2").write_text('{"zero_optimization": {"stage": 1}}', encoding="utf-8")
    (tmp_path / "mine").write_text('{"zero_optimization": {"stage": 1}}', encoding="utf-8")
    for name in ("zero2", "zero3"):
        assert load_ds_config(name) == json.loads(ds_configs.path(name).read_text(encoding="utf-8"))
    assert zero_stage(load_ds_config("./zero2")) == 1
    with pytest.raises(RecipeError, match=r"no DeepSpeed configuration 'mine'.*path of a \.json file"):
        load_ds_config("mine")
    with pytest.raises(RecipeError, match=r"auto is chosen .* when a run starts; name a configuration here \(zero0"):
        resolve_ds_config(recipe(deepspeed={"config": "auto"}), 2)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"steps_per_print": 1' + "0" * 5000 + "}", "\udcff", '{"a": "\x00"}'])
def test_a_file_that_is_no_json_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RecipeError, match=r"deepspeed\.config: .*mine\.json: "):
        load_ds_config(str(file))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_batch_is_completed_from_recipe_and_ranks(world_size: int) -> None:
    resolved = resolve_ds_config(recipe(), world_size)
    assert resolved["train_batch_size"] == 8
    assert (
        resolved["train_micro_batch_size_per_gpu"] * resolved["gradient_accumulation_steps"] * world_size
        == resolved["train_batch_size"]
    )
    assert resolved["gradient_clipping"] == 1.0


def test_a_batch_that_the_ranks_cannot_share_is_refused_with_what_would_do() -> None:
    with pytest.raises(RecipeError, match=r"batch\.sequences: 8 .* 3 ranks.*(6 or 12)"):
        resolve_ds_config(recipe(), 3)
    with pytest.raises(RecipeError, match=r"set batch\.micro_batch to 1"):
        resolve_ds_config(recipe(), 8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_batch_size": 16}, "train_batch_size is 16 .* batch.sequences is 8"),
        ({"train_micro_batch_size_per_gpu": 4}, "micro_batch"),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps"),
        ({"gradient_clipping": 0.5}, "optim.grad_clip"),
        ({"bf16": {"enabled": True}}, "precision is fp32"),
        ({"fp16": {"enabled": True}}, "precision is fp32"),
        ({"activation_checkpointing": {}}, "activation_checkpointing"),
    ],
)
def test_a_file_that_contradicts_the_recipe_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolve_ds_config(recipe(), 2, {"zero_optimization": {"stage": 3}, **values})


def test_a_file_that_repeats_the_recipe_is_accepted() -> None:
    given = {
        "zero_optimization": {"stage": 3},
        "train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
    }
    assert resolve_ds_config(recipe(precision="bf16"), 2, given)["bf16"] == {"enabled": True}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_without_master_weights_is_refused(precision: str) -> None:
    with pytest.raises(RecipeError, match="stage 0"):
        resolve_ds_config(recipe(precision=precision, deepspeed={"config": "zero0"}), 2)


def test_settings_that_lose_the_check_for_non_finite_gradients_are_refused() -> None:
    stage = {"zero_optimization": {"stage": 1}}
    with pytest.raises(RecipeError, match="non-finite"):
        resolve_ds_config(recipe(precision="bf16"), 2, {**stage, "data_types": {"grad_accum_dtype": "fp32"}})
    with pytest.raises(RecipeError, match="check_grad_overflow"):
        resolve_ds_config(recipe(precision="bf16"), 2, {**stage, "bf16": {"check_grad_overflow": False}})


def test_files_are_found_by_name_and_by_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}}), encoding="utf-8")
    assert zero_stage(load_ds_config(str(file))) == 2
    with pytest.raises(RecipeError, match="did you mean 'zero3'"):
        load_ds_config("zero33")
    with pytest.raises(RecipeError, match="no such file"):
        load_ds_config(str(tmp_path / "absent.json"))
    file.write_text('{"zero_optimization": {"stage": 2,}}', encoding="utf-8")
    with pytest.raises(RecipeError, match="cannot be read as JSON"):
        load_ds_config(str(file))
    file.write_text('{"steps_per_print": 1, "steps_per_print": 2}', encoding="utf-8")
    with pytest.raises(RecipeError, match="'steps_per_print' is given twice"):
        load_ds_config(str(file))


def test_a_bucket_holds_two_layers() -> None:
    # 360m: 960 wide, 15 heads and 5 for keys and values, 64 each, feed-forward 2560.
    layer = 960 * (960 + 2 * 320) + 960 * 960 + 3 * 960 * 2560
    config = preset("360m", "mor", 3)
    assert {s.key: s.value for s in choose_settings(3, config)} == {
        "reduce_bucket_size": 2 * layer,
        "stage3_prefetch_bucket_size": layer,
    }
    assert {s.key: s.value for s in choose_settings(1, config)} == {
        "reduce_bucket_size": 2 * layer,
        "allgather_bucket_size": 2 * layer,
    }
    assert choose_settings(0, config) == []


@pytest.mark.parametrize("key", ["stage3_prefetch_bucket_size", "prefetch_bucket_size"])
def test_what_the_file_says_stays(key: str) -> None:
    config = preset("360m", "vanilla", 1)
    zero = {"stage": 3, "overlap_comm": True, key: 7, "reduce_bucket_size": 5}
    assert complete(zero, config) == zero
    lines = explain(zero, config)
    assert len(lines) == 2 and all(line.endswith("as the DeepSpeed configuration says") for line in lines)
    assert [line.split(":")[0] for line in lines] == ["reduce_bucket_size 5", "stage3_prefetch_bucket_size 7"]
    chosen = complete({"stage": 3}, config)
    assert (
        explain(chosen, config)[0]
        == "reduce_bucket_size 19,660,800: gradients of two layers, sent while others are computed"
    )


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3"])
def test_deepspeed_takes_what_is_chosen(stage: str) -> None:
    section = resolve_ds_config(recipe(deepspeed={"config": stage}), 2)["zero_optimization"]
    read = DeepSpeedZeroConfig(**section)
    if stage == "zero0":
        assert read.reduce_bucket_size == 500_000_000
    else:
        assert read.reduce_bucket_size == 5_000_000
        assert read.prefetch_bucket_size == (5_000_000 if stage == "zero3" else 50_000_000)
