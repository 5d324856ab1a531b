"""Buckets follow from the network where the DeepSpeed JSON leaves them open, and what it says stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from mor_model.presets import preset
from pretrain.recipe.deepspeed_json import choose_settings, complete, explain, resolve_ds_config
from pretrain.recipe.recipe import build_recipe
from tests.pretrain.support import recipe_values


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
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    recipe = build_recipe(recipe_values(Path("data"), Path("run"), deepspeed={"config": stage}))
    section = resolve_ds_config(recipe, 2)["zero_optimization"]
    read = DeepSpeedZeroConfig(**section)
    if stage == "zero0":
        assert read.reduce_bucket_size == 500_000_000
    else:
        assert read.reduce_bucket_size == 5_000_000
        assert read.prefetch_bucket_size == (5_000_000 if stage == "zero3" else 50_000_000)
