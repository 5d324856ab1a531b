"""Training through slurm/train.sbatch on a real cluster: undisturbed, announced, held, cancelled and misspelt."""

from __future__ import annotations

import json

import pytest

from pretrain.signals import EXIT_HELD, EXIT_USER
from tests.pretrain.support import losses, metrics
from tests.slurm.cluster import most_at_once
from tests.slurm.training import STEPS, log, reached, restarted, submit

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm")]


def test_two_nodes_train_one_recipe(cluster, undisturbed):
    assert sorted(undisturbed) == list(range(1, STEPS + 1))
    environment = json.loads((cluster.folder / "work" / "runs" / "undisturbed" / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert environment["launcher"] == "srun"


def test_an_announced_end_is_survived_with_the_same_losses(cluster, recipes, undisturbed):
    recipe, run = recipes("announced")
    job = submit(cluster, recipe)
    cluster.until(lambda: reached(run, 2), "step 2")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.until(lambda: restarted(cluster, job), "the requeue")
    assert cluster.wait(job) == "COMPLETED", log(cluster, recipe)
    stopped = [record for record in metrics(run, "event") if record["event"] == "stopped"]
    assert len(stopped) == 1 and 2 <= stopped[0]["step"] < STEPS, "it was not interrupted in the middle"
    assert losses(run) == undisturbed


def test_a_recipe_that_cannot_be_used_ends_before_anything_starts(cluster, recipes):
    recipe, run = recipes("misspelt")
    recipe.write_text(recipe.read_text().replace("optim:", "optimm:"))
    job = submit(cluster, recipe)
    assert cluster.wait(job) == "FAILED"
    assert cluster.show(job)["ExitCode"] == f"{EXIT_USER}:0"
    assert "did you mean 'optim'" in log(cluster, recipe)
    assert not run.exists()


@pytest.mark.slow
def test_stopping_by_hand_is_not_undone_by_the_queue(cluster, recipes):
    recipe, run = recipes("held")
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


@pytest.mark.slow
def test_a_chain_replaces_requeueing(cluster, recipes, undisturbed):
    recipe, run = recipes("chained", logging={"every": 1, "wandb": "offline"})
    job = submit(cluster, recipe, "--array=1-10%1", "--no-requeue")
    cluster.until(lambda: reached(run, 2), "step 2")
    # For elements of arrays scancel's exit code is 229 although the signal arrives.
    cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_1", check=False)
    assert cluster.wait(f"{job}_2") == "COMPLETED", log(cluster, recipe)
    assert cluster.wait(f"{job}_1") == "COMPLETED"
    assert not cluster.run("squeue", "-h", "-r").stdout.strip(), "nothing is left for the other elements to do"
    assert most_at_once([cluster.interval(f"{job}_{element}") for element in (1, 2)]) == 1
    assert losses(run) == undisturbed
    offline = [folder.name for folder in (run / "wandb").glob("offline-run-*")]
    assert len(offline) == 2 and len({name.rsplit("-", 1)[1] for name in offline}) == 1, "two starts, one wandb run"


@pytest.mark.slow
def test_the_deepspeed_launcher_trains_the_same(cluster, recipes, undisturbed):
    recipe, run = recipes("launched")
    job = submit(cluster, recipe, MOR_LAUNCHER="deepspeed")
    assert cluster.wait(job) == "COMPLETED", log(cluster, recipe)
    assert json.loads((run / "environment.json").read_text())["launcher"] == "deepspeed"
    assert (run.parent / ".launched.hostfile").read_text() == "node1 slots=1\nnode2 slots=1\n"
    assert losses(run) == undisturbed
