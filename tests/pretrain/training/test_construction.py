"""A network under ZeRO-3 is partitioned while it is built: no rank ever holds the whole of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mor_model.flops import count_parameters
from pretrain.recipe.recipe import build_recipe
from tests.pretrain.support import Job, recipe_values, tiny_model, write_recipe

RANKS = 4
# Builds the engine up to where DeepSpeed takes over the network, and says how much memory that has taken at most.
PROGRAM = """
import os, re, sys
from pathlib import Path

import deepspeed

from pretrain.recipe.deepspeed_json import resolve_ds_config
from pretrain.recipe.plan import make_plan
from pretrain.training.engine import build_engine, start_process_group
from pretrain.ranks.environment import prepare_environment
from pretrain.recipe.recipe import load_recipe


def resident(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def measured(**settings):
    Path(os.environ["RESULT"] + os.environ["RANK"]).write_text(str(resident("VmHWM") - before))
    sys.exit(0)


ranks = prepare_environment()
start_process_group(ranks, 120)
recipe = load_recipe(sys.argv[2])
deepspeed.initialize = measured
settings = resolve_ds_config(recipe, ranks.world_size)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = resident("VmRSS")
build_engine(recipe, settings, make_plan(recipe).learning_rate, None)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "partitioned"), [("zero3", True), ("zero2", False)])
def test_no_rank_holds_the_whole_network(tmp_path: Path, stage: str, partitioned: bool) -> None:
    """Of 310 MB each of four ranks keeps a quarter; beside it lies one matrix at a time. At other stages all of it."""
    shape = {"hidden_size": 512, "num_heads": 8, "num_kv_heads": 8, "intermediate_size": 1536, "num_layers": 20}
    model = tiny_model("vanilla", vocab_size=20_000, **shape)
    values = recipe_values(tmp_path, tmp_path / "run", model=model, deepspeed={"config": stage})
    values["batch"]["sequences"] = 2 * RANKS
    script = tmp_path / "build.py"
    script.write_text(PROGRAM, encoding="utf-8")
    # glibc's heap would keep what is freed, and the process would be as large as all that was ever gathered.
    eager = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    extra = {"RESULT": str(tmp_path / "grown-"), **eager}
    job = Job(write_recipe(tmp_path / "r.yaml", values), ranks=RANKS, extra=extra, script=script)
    codes, output, errors = job.wait()
    assert codes == [0] * RANKS, output + errors
    whole = 4 * count_parameters(build_recipe(values).network).total_stored
    grown = [json.loads((tmp_path / f"grown-{rank}").read_text(encoding="utf-8")) for rank in range(RANKS)]
    if partitioned:
        assert all(whole / RANKS < size < 0.6 * whole for size in grown), (whole, grown)
    else:
        assert all(size > whole for size in grown), (whole, grown)
