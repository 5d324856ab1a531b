"""Training through slurm/train.sbatch on a real cluster: plain, interrupted, and interrupted by force."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pretrain.signals import EXIT_HELD
from tests.pretrain.support import losses, make_dataset, metrics, recipe_values, tiny_model, write_recipe
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm")]
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "slurm" / "train.sbatch")
STEPS = 24
TWO_NODES = ("--nodes=2", "--time=60", "--ntasks-per-node=1", "--gpus-per-node=1", "--mem=1500")


@pytest.fixture(scope="module")
def recipes(cluster: Cluster, tmp_path_factory):
    """Writes a recipe for this cluster; the data set is made once."""
    data = make_dataset(tmp_path_factory.mktemp("data") / "set")

    def write(name: str, **changes) -> tuple[Path, Path]:
        run = cluster.folder / "work" / "runs" / name
        values = recipe_values(data, run, model=tiny_model("vanilla"), checkpoint={"every": 1000}, **changes)
        return write_recipe(cluster.folder / "work" / f"{name}.yaml", {**values, "name": name}), run

    return write


def submit(cluster: Cluster, recipe: Path, *options: str, **environ: str) -> str:
    output = f"--output={recipe.stem}.out"
    setup = {"MOR_SETUP": "true", "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"], **environ}
    return cluster.submit(*TWO_NODES, output, *options, SCRIPT, str(recipe), **setup)


def log(cluster: Cluster, recipe: Path) -> str:
    return (cluster.folder / "work" / f"{recipe.stem}.out").read_text()


def reached(run: Path, step: int) -> str | None:
    try:
        steps = losses(run)
    except (OSError, ValueError):
        return None
    return "yes" if steps and max(steps) >= step else None


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, recipes):
    recipe, run = recipes("undisturbed", budget={"steps": STEPS})
    job = submit(cluster, recipe)
    assert cluster.wait(job) == "COMPLETED", log(cluster, recipe)
    return losses(run)


def test_two_nodes_train_one_recipe(cluster, undisturbed):
    assert sorted(undisturbed) == list(range(1, STEPS + 1))
    environment = json.loads((cluster.folder / "work" / "runs" / "undisturbed" / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert environment["launcher"] == "srun"


def test_an_announced_end_is_survived_with_the_same_losses(cluster, recipes, undisturbed):
    recipe, run = recipes("announced", budget={"steps": STEPS})
    job = submit(cluster, recipe)
    cluster.until(lambda: reached(run, 2), "step 2")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.until(lambda: "yes" if cluster.show(job)["Restarts"] == "1" else None, "the requeue")
    assert cluster.wait(job) == "COMPLETED", log(cluster, recipe)
    stopped = [record for record in metrics(run, "event") if record["event"] == "stopped"]
    assert len(stopped) == 1 and 2 <= stopped[0]["step"] < STEPS, "it was not interrupted in the middle"
    assert losses(run) == undisturbed


@pytest.mark.slow
def test_stopping_by_hand_is_not_undone_by_the_queue(cluster, recipes):
    recipe, run = recipes("held", budget={"steps": STEPS})
    job = submit(cluster, recipe)
    cluster.until(lambda: reached(run, 1), "step 1")
    (run / "stop").touch()
    assert cluster.wait(job) == "FAILED", log(cluster, recipe)
    record = cluster.show(job)
    assert record["ExitCode"] == f"{EXIT_HELD}:0"
    assert record["Restarts"] == "0"
    assert not (run / "stop").exists(), "the next start must not stop at once"


@pytest.mark.slow
def test_cancelling_is_not_undone_by_the_queue(cluster, recipes):
    recipe, run = recipes("cancelled", budget={"steps": 10 * STEPS})
    job = submit(cluster, recipe)
    cluster.until(lambda: reached(run, 1), "step 1")
    cluster.run("scancel", job)
    assert cluster.wait(job) == "CANCELLED", log(cluster, recipe)
    assert cluster.show(job)["Restarts"] == "0"


def test_a_recipe_that_cannot_be_used_ends_before_anything_starts(cluster, recipes):
    recipe, run = recipes("misspelt")
    recipe.write_text(recipe.read_text().replace("optim:", "optimm:"))
    job = submit(cluster, recipe)
    assert cluster.wait(job) == "FAILED"
    assert cluster.show(job)["ExitCode"] == "2:0"
    assert "did you mean 'optim'" in log(cluster, recipe)
    assert not run.exists()
