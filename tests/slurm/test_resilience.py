"""What a month on a cluster brings: nodes that go, jobs that are pushed aside, and ranks that crash at every start."""

from __future__ import annotations

import pytest

from pretrain.ranks.signals import EXIT_NO_PROGRESS
from tests.pretrain.support import losses
from tests.slurm.cluster import Cluster
from tests.slurm.stand_ins import start_python_with
from tests.slurm.training import log, reached, restarted, submit

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm")]
OFTEN = {"every": 4}


def both_nodes_back(cluster: Cluster) -> None:
    """Until both nodes take jobs again."""
    cluster.run("scontrol", "update", "nodename=node2", "state=resume", check=False)
    cluster.until(
        lambda: "yes" if "down" not in cluster.run("sinfo", "-h", "-N", "-o", "%T").stdout else None, "both nodes", 90
    )


def test_a_node_that_is_set_down(cluster, recipes, undisturbed):
    recipe, run = recipes("downed", checkpoint=OFTEN)
    job = submit(cluster, recipe)
    cluster.until(lambda: reached(run, 6), "step 6")
    cluster.run("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    cluster.until(lambda: restarted(cluster, job), "the requeue")
    both_nodes_back(cluster)
    assert cluster.wait(job) == "COMPLETED", log(cluster, recipe)
    assert losses(run) == undisturbed


@pytest.mark.parametrize("processes", [False, True], ids=["its daemon alone", "with all its processes"])
def test_a_node_that_dies(cluster, recipes, undisturbed, processes):
    recipe, run = recipes(f"lost-{processes}", checkpoint=OFTEN)
    job = submit(cluster, recipe, "--gpus-per-node=0")
    cluster.until(lambda: reached(run, 6), "step 6")
    cluster.kill_node("node2", processes=processes)
    try:
        # Slurm notices after SlurmdTimeout. Ranks whose daemon alone died live on, and may even finish before that.
        cluster.until(
            lambda: "yes" if "down" in cluster.run("sinfo", "-h", "-N", "-o", "%T").stdout else None, "the loss", 120
        )
    finally:
        cluster.start_node("node2")
    both_nodes_back(cluster)
    state = cluster.wait(job)
    # Slurm 22.05 loses count of the generic resources of a job that is requeued while one of its nodes is gone: they
    # stay taken, and no other test would get them.
    cluster.run("scontrol", "reconfigure")
    assert state == "COMPLETED", log(cluster, recipe)
    assert restarted(cluster, job) or not processes
    assert losses(run) == undisturbed


def test_a_more_urgent_job_takes_the_nodes(cluster, recipes, undisturbed):
    recipe, run = recipes("pushed-aside", checkpoint=OFTEN)
    job = submit(cluster, recipe)
    cluster.until(lambda: reached(run, 6), "step 6")
    urgent = cluster.submit(
        "--partition=urgent", "--nodes=2", "--exclusive", "--output=urgent.out", "--wrap=srun sleep 2"
    )
    assert cluster.wait(urgent) == "COMPLETED"
    assert restarted(cluster, job)
    assert cluster.wait(job) == "COMPLETED", log(cluster, recipe)
    assert losses(run) == undisturbed


def test_a_crash_loop_stops_with_its_reason(cluster, recipes, tmp_path):
    recipe, _ = recipes("crashing")
    crash = "import os\nif os.environ.get('SLURM_PROCID') == '1':\n    os._exit(9)\n"
    job = submit(cluster, recipe, PYTHONPATH=start_python_with(tmp_path / "crash", crash))
    assert cluster.wait(job) == "FAILED", log(cluster, recipe)
    assert cluster.show(job)["ExitCode"] == f"{EXIT_NO_PROGRESS}:0"
    assert cluster.show(job)["Restarts"] == "3"
    assert "started 4 times without a checkpoint after step 0" in log(cluster, recipe)


def test_a_node_that_is_not_fit_is_named_and_nothing_starts_on_it(cluster, recipes, tmp_path):
    recipe, run = recipes("unfit")
    # Python ends at once on node2, as with a broken mount of the environment.
    broken = "import os\nif os.environ.get('SLURMD_NODENAME') == 'node2':\n    os._exit(1)\n"
    job = submit(cluster, recipe, PYTHONPATH=start_python_with(tmp_path / "broken", broken), MOR_HEALTH="exclude")
    assert cluster.wait(job) == "FAILED", log(cluster, recipe)
    assert "fewer than 2 other nodes" in log(cluster, recipe) and cluster.show(job)["Restarts"] == "0"
    assert "node node2 is not fit: wrote no report" in log(cluster, recipe)
    assert "node1 is not fit" not in log(cluster, recipe)
    assert not run.exists()
