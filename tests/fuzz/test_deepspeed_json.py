"""DeepSpeed JSON files: mutated as bytes and as values, against several recipes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ds_configs
from pretrain.recipe.deepspeed_json import explain, resolve_ds_config
from pretrain.recipe.deepspeed_keys import FROM_THE_RECIPE
from pretrain.recipe.recipe import build_recipe
from tests.fuzz.recipes import PLAIN
from tests.fuzz.support import counts, drive, leaves, lost, mutate_file, mutate_values

THEIRS: dict[str, Any] = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True, "ratio": 0.5},
        "offload_param": {"device": "none"},
        "overlap_comm": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": 5e7,
        "stage3_max_live_parameters": 1e9,
        "leaf_module": {"classes": ["a.B"]},
    },
    "gradient_accumulation_steps": 2,
    "gradient_clipping": "auto",
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": "auto",
    "steps_per_print": 10,
    "wall_clock_breakdown": False,
    "communication_data_type": "bf16",
    "flops_profiler": {"enabled": False, "profile_step": 1, "output_file": None},
    "data_types": {"grad_accum_dtype": "fp32"},
    "timers": {"throughput": {"enabled": True}},
    "checkpoint": {"tag_validation": "Warn", "writer": {"type": "x"}},
    "comms_logger": {"enabled": False, "prof_ops": ["all_reduce"]},
}
SHIPPED = [json.loads(ds_configs.path(name).read_text(encoding="utf-8")) for name in ds_configs.names()]
FILES = [*SHIPPED, THEIRS, THEIRS, THEIRS]
PRECISIONS = ("fp32", "bf16", "fp16", "bf16_autocast")

Given = tuple[str, bytes]


@pytest.fixture(autouse=True)
def _an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def use(given: Given) -> dict[str, Any]:
    precision, content = given
    Path("mine.json").write_bytes(content)
    recipe = build_recipe({**PLAIN, "precision": precision, "deepspeed": {"config": "mine.json"}})
    resolved = resolve_ds_config(recipe, 2)
    explain(resolved["zero_optimization"], recipe.network)
    return resolved


def changed(given: Given, resolved: dict[str, Any]) -> str | None:
    """Every value is kept but an `auto` that the recipe fills, and the sections of other precisions."""
    read = json.loads(given[1])
    for path, value in leaves(read).items():
        other = path[:1] in (("bf16",), ("fp16",), ("torch_autocast",)) and path[0] not in resolved
        filled = value == "auto" and ".".join(path) in FROM_THE_RECIPE
        if not (other or filled) and value != {}:
            found: Any = resolved
            for key in path:
                found = found.get(key, ...) if isinstance(found, dict) else ...
            if (difference := lost(value, found)) is not None:
                return f"{'.'.join(path)}: {difference}"
    return None


def as_values(source: random.Random) -> Given:
    return source.choice(PRECISIONS), json.dumps(mutate_values(source.choice(FILES), source)).encode()


def as_bytes(source: random.Random) -> Given:
    return source.choice(PRECISIONS), mutate_file(json.dumps(source.choice(FILES), indent=1), source)


@counts
@pytest.mark.parametrize(("make", "used", "refused"), [(as_values, 0.05, 0.25), (as_bytes, 0.01, 0.5)])
def test_deepspeed_json(count: int, make: Callable[[random.Random], Given], used: float, refused: float) -> None:
    drive(count, make, use, changed=changed, used=used, refused=refused)
