"""The shipped DeepSpeed configurations beyond plain ZeRO stages, as far as a CPU can execute them, and torch.compile.

DeepSpeed builds its CPU Adam and its asynchronous file access the first time, which takes minutes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import ds_configs
from pretrain.errors import RecipeError
from pretrain.recipe.recipe import build_recipe
from pretrain.training.prepare import prepare
from tests.conftest import skip_or_fail
from tests.pretrain.checkpoints.test_resume import assert_same_run, cut_back
from tests.pretrain.reference import plain_losses
from tests.pretrain.support import ALONE, Nursery, Workers, losses, recipe_values, train, write_recipe
from tests.pretrain.training.test_training import compare


def shipped(name: str, folder: Path, **zero: Any) -> dict[str, Any]:
    """A shipped configuration with some settings of its `zero_optimization` replaced."""
    values = json.loads(ds_configs.path(name).read_text(encoding="utf-8"))
    values["zero_optimization"] |= zero
    file = folder / f"{name}.json"
    file.write_text(json.dumps(values), encoding="utf-8")
    return {"config": str(file)}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["zero3_offload_optimizer", "zero3_offload_all"])
def test_offloaded_training_is_that_of_one_plain_process(
    tmp_path: Path, tiny_data: Path, two_ranks: Workers, name: str
) -> None:
    """Losses and weights in fp32, losses in bf16, and a resumed run."""
    values = recipe_values(tiny_data, tmp_path / "run", deepspeed={"config": name}, checkpoint={"every": 5, "keep": 9})
    whole = two_ranks.train(tmp_path, values)
    compare(whole, values)
    file = cut_back(whole, {**values, "run_dir": str(tmp_path / "again")}, tmp_path, 5)
    code, printed = two_ranks.run("--config", str(file))
    assert code == 0 and "resuming at step 5" in printed, printed
    assert_same_run(tmp_path / "again", whole)
    half = two_ranks.train(tmp_path, {**values, "precision": "bf16", "run_dir": str(tmp_path / "half")})
    assert list(losses(half).values()) == pytest.approx(plain_losses(values)[0], abs=0.05)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_disk_holds_weights_and_optimiser_states(tmp_path: Path, tiny_data: Path, nursery: Nursery) -> None:
    if not Path("/usr/include/libaio.h").exists():
        skip_or_fail("DeepSpeed reads and writes NVMe through libaio, whose headers are not here (apt: libaio-dev)")
    disk = tmp_path / "nvme"
    disk.mkdir()
    moved = {"nvme_path": str(disk), "device": "nvme"}
    config = shipped("zero3_nvme", tmp_path, offload_optimizer=moved, offload_param=moved)
    values = recipe_values(tiny_data, tmp_path / "run", deepspeed=config, checkpoint={"every": 0})
    train(write_recipe(tmp_path / "r.yaml", values), ranks=2, nursery=nursery)
    compare(tmp_path / "run", values)
    # DeepSpeed takes its files away at the end and leaves their folders.
    for kind in ("optimizer", "float32params"):
        assert sorted(folder.name for folder in (disk / "zero_stage_3" / kind).iterdir()) == ["rank0", "rank1"]


@pytest.mark.slow
def test_secondary_partitions_change_no_loss(tmp_path: Path, tiny_data: Path, two_ranks: Workers) -> None:
    """ZeRO++ without its quantisation, which only GPUs have kernels for; twice, as branches need it in one process."""
    config = shipped("zeropp", tmp_path, zero_quantized_weights=False, zero_quantized_gradients=False)
    values = recipe_values(tiny_data, tmp_path / "run", deepspeed=config, budget={"steps": 12, "branches": [10]})
    run = two_ranks.train(tmp_path, values)
    compare(run, {**values, "budget": {"steps": 12}})
    compare(run / "branches" / "10", {**values, "budget": {"steps": 10}})


def test_quantised_communication_wants_a_gpu(tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.training.prepare.accelerator_present", lambda: False)
    recipe = build_recipe(recipe_values(tiny_data, tmp_path / "run", deepspeed={"config": "zeropp"}))
    with pytest.raises(RecipeError, match=r"zero_quantized_weights.*GPU"):
        prepare(recipe, ALONE)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile builds C++ on a CPU")
def test_compiled_training_is_that_of_one_plain_process(tmp_path: Path, tiny_data: Path, two_ranks: Workers) -> None:
    values = recipe_values(tiny_data, tmp_path / "run", compile=True, budget={"steps": 6})
    compare(two_ranks.train(tmp_path, values), values, tolerance=1e-4)
