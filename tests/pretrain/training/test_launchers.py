"""One recipe under every launcher: the same losses. srun's turn is in tests/slurm."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import skip_or_fail
from tests.ports import free_port
from tests.pretrain.support import ROOT, environment, losses, make_dataset, recipe_values, write_recipe

LAUNCHERS = {
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port())],
    "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", str(free_port())],
    "openmpi": ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("launchers") / "data")


def train(folder: Path, data: Path, launcher: list[str]) -> dict[int, float]:
    recipe = write_recipe(
        folder / "recipe.yaml",
        recipe_values(data, folder / "run", budget={"steps": 6}, schedule={"kind": "constant", "warmup": 0}),
    )
    command = [*launcher, str(ROOT / "pretrain" / "train.py"), "--config", str(recipe)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(folder / "run")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, data) -> dict[int, float]:
    return train(tmp_path_factory.mktemp("python"), data, [sys.executable])


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, data) -> dict[int, float]:
    return train(tmp_path_factory.mktemp("torchrun"), data, LAUNCHERS["torchrun"])


def test_every_form_of_the_command_line_says_the_same(tmp_path):
    recipe = str(write_recipe(tmp_path / "recipe.yaml", recipe_values(tmp_path / "data", tmp_path / "run")))
    mor = [sys.executable, "-m", "pretrain.cli.main", "train"]
    script = [sys.executable, str(ROOT / "pretrain" / "train.py")]
    commands = [
        [*mor, recipe, "seed=8", "--run-dir=a #2", "--print", "budget.steps=24"],
        [*script, "--local_rank=0", "--config", recipe, "--run-dir=a #2", "seed=8", "--print", "budget.steps=24"],
    ]
    shown = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for command in commands]
    assert shown[0] == shown[1]
    assert {"seed: 8", "run_dir: 'a #2'", "  steps: 24"} <= set(shown[0].splitlines())
    missing = subprocess.run(mor, capture_output=True, text=True)
    assert missing.returncode == 2 and "the recipe file is missing" in missing.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_trains_the_same(launcher, tmp_path, data, two_processes, one_process):
    if not shutil.which(LAUNCHERS[launcher][0]):
        skip_or_fail(f"{LAUNCHERS[launcher][0]} is not installed (pip install 'mor-pretrain[mpi]' brings mpirun)")
    found = train(tmp_path, data, LAUNCHERS[launcher])
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["launcher"] == launcher
    assert found == two_processes, "the launcher must not change one bit"
    assert found == pytest.approx(one_process, rel=1e-5), "nor may the number of ranks, beyond rounding"


RESTARTED = """
import datetime, os
import torch
import torch.distributed as dist
from pretrain.ranks.environment import prepare_environment
from pretrain.ranks.rendezvous import METHOD
ranks = prepare_environment()
dist.init_process_group("gloo", init_method=METHOD, timeout=datetime.timedelta(seconds=120))
total = torch.ones(1)
dist.all_reduce(total)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and ranks.rank == 1:
    raise SystemExit(1)
dist.all_reduce(total)
os.write(1, f"FINISHED {total.item()}\\n".encode())  # in one piece, whatever the other rank writes
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("standalone", [True, False])
def test_torchrun_starts_again_what_has_failed(tmp_path, standalone):
    options = ["--standalone"] if standalone else ["--master-port", str(free_port())]
    script = tmp_path / "restarted.py"
    script.write_text(RESTARTED)
    command = ["torchrun", "--nproc-per-node", "2", "--max-restarts", "1", *options, str(script)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=110)
    assert done.returncode == 0 and done.stdout.count("FINISHED 4.0") == 2, done.stdout + done.stderr
