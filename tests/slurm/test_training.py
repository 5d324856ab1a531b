"""Training through slurm/train.sbatch on a real cluster: undisturbed, announced, held and cancelled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.ranks.signals import EXIT_HELD, EXIT_USER
from tests.pretrain.support import losses, metrics
from tests.slurm.cluster import most_at_once
from tests.slurm.training import STEPS, log, reached, restarted, submit

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm")]


def state(run: Path) -> str | None:
    file = run / "status.json"
    return json.loads(file.read_text())["state"] if file.is_file() else None


def test_two_nodes_train_one_recipe(cluster, undisturbed):
    assert sorted(undisturbed) == list(range(1, STEPS + 1))
    environment = json.loads((cluster.work / "runs" / "undisturbed" / "environment.json").read_text())
    assert (environment["world_size"], environment["launcher"]) == (2, "srun")


def test_an_announced_end_is_survived_with_the_same_losses(cluster, recipes, undisturbed):
    recipe, run = recipes("announced")
    job = submit(cluster, recipe)
    reached(cluster, run, 2)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.until(lambda: restarted(cluster, job), "the requeue")
    assert cluster.wait(job) == "COMPLETED", log(cluster, recipe)
    stopped = [record for record in metrics(run, "event") if record["event"] == "stopped"]
    assert len(stopped) == 1 and 2 <= stopped[0]["step"] < STEPS, "it was not interrupted in the middle"
    assert losses(run) == undisturbed


@pytest.mark.slow
def test_an_end_announced_to_a_branch_is_not_the_end_of_the_run(cluster, recipes):
    # The branch is half of the work, so that it can be interrupted.
    steps, schedule = 4 * STEPS, {"kind": "wsd", "warmup": 2, "decay": 0.9}
    recipe, run = recipes("branching", budget={"steps": steps, "branches": [steps - 2]}, schedule=schedule)
    branch = run / "branches" / str(steps - 2)
    job = submit(cluster, recipe)
    cluster.until(lambda: state(branch) == "running", "the branch")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.until(lambda: restarted(cluster, job), "the requeue")
    assert cluster.wait(job) == "COMPLETED", log(cluster, recipe)
    # The branch's records hold the trunk's, which was not stopped.
    stopped = [record["step"] for record in metrics(branch, "event") if record["event"] == "stopped"]
    assert len(stopped) == 1 and stopped[0] < steps - 2, "it was not interrupted in the branch"
    assert state(branch) == state(run) == "finished"
    again = submit(cluster, recipe, "--open-mode=append")
    assert cluster.wait(again) == "COMPLETED" and f"{run} is finished." in log(cluster, recipe)


@pytest.mark.slow
def test_what_every_rank_ends_with_is_not_taken_for_a_crash(cluster, recipes):
    # srun ends the other rank when the first one gives up, and returns 143.
    recipe, _ = recipes("not-finite", optim={"lr": 1e30}, faults={"max_non_finite": 1})
    job = submit(cluster, recipe, "--array=1-3%1", "--no-requeue")
    cluster.until(cluster.is_empty, "the chain's end")
    assert cluster.show(f"{job}_1")["ExitCode"] == f"{EXIT_USER}:0", log(cluster, recipe)
    assert log(cluster, recipe).count("not-finite: training") == 1, "the chain went on"


@pytest.mark.slow
def test_stopping_by_hand_is_not_undone_by_the_queue(cluster, recipes):
    recipe, run = recipes("held")
    job = submit(cluster, recipe)
    reached(cluster, run, 1)
    (run / "stop").touch()
    assert cluster.wait(job) == "FAILED", log(cluster, recipe)
    record = cluster.show(job)
    assert (record["ExitCode"], record["Restarts"]) == (f"{EXIT_HELD}:0", "0")
    assert not (run / "stop").exists(), "the next start must not stop at once"


@pytest.mark.slow
def test_cancelling_is_not_undone_by_the_queue(cluster, recipes):
    recipe, run = recipes("cancelled", budget={"steps": 10 * STEPS})
    job = submit(cluster, recipe)
    reached(cluster, run, 1)
    cluster.run("scancel", job)
    assert cluster.wait(job) == "CANCELLED", log(cluster, recipe)
    assert cluster.show(job)["Restarts"] == "0"


@pytest.mark.slow
def test_a_chain_replaces_requeueing(cluster, recipes, undisturbed):
    recipe, run = recipes("chained", logging={"every": 1, "wandb": "offline"})
    job = submit(cluster, recipe, "--array=1-10%1", "--no-requeue")
    reached(cluster, run, 2)
    # For elements of arrays scancel's exit code is 229 although the signal arrives.
    cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_1", check=False)
    assert cluster.wait(f"{job}_2") == "COMPLETED", log(cluster, recipe)
    assert cluster.wait(f"{job}_1") == "COMPLETED"
    assert cluster.is_empty(), "nothing is left for the other elements to do"
    assert most_at_once([cluster.interval(f"{job}_{element}") for element in (1, 2)]) == 1
    assert losses(run) == undisturbed
    offline = [folder.name for folder in (run / "wandb").glob("offline-run-*")]
    assert len(offline) == 2 and len({name.rsplit("-", 1)[1] for name in offline}) == 1, "two starts, one wandb run"
