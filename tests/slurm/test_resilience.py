"""What a month on a cluster brings: nodes that go, jobs that are pushed aside, and ranks that crash at every start."""

from __future__ import annotations

from functools import partial

import pytest

from pretrain.ranks.signals import EXIT_NO_PROGRESS
from tests.pretrain.support import losses
from tests.slurm.cluster import Cluster
from tests.slurm.stand_ins import start_python_with
from tests.slurm.training import log, reached, restarted, submit

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm")]


def nodes(cluster: Cluster) -> str:
    """The states of the nodes."""
    return cluster.run("sinfo", "-h", "-N", "-o", "%T").stdout


def set_down(cluster: Cluster) -> None:
    cluster.run("scontrol", "update", "nodename=node2", "state=down", "reason=test")


def lose(cluster: Cluster, *, processes: bool) -> None:
    """Kill node2's daemon, start it again once Slurm has noticed (after SlurmdTimeout)."""
    cluster.kill_node("node2", processes=processes)
    try:
        cluster.until(lambda: "down" in nodes(cluster), "the loss", 120)
    finally:
        cluster.start_node("node2")


def take_both_nodes(cluster: Cluster) -> None:
    options = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=urgent.out")
    assert cluster.wait(cluster.submit(*options, "--wrap=srun sleep 2")) == "COMPLETED"


DISTURBANCES = {
    "set-down": set_down,
    "daemon-killed": partial(lose, processes=False),
    "node-killed": partial(lose, processes=True),
    "preempted": take_both_nodes,
}


@pytest.mark.parametrize("name", DISTURBANCES)
def test_the_losses_are_those_of_an_undisturbed_run(cluster, recipes, undisturbed, name):
    recipe, run = recipes(name, checkpoint={"every": 4})
    job = submit(cluster, recipe, "--gpus-per-node=0")
    reached(cluster, run, 6)
    DISTURBANCES[name](cluster)
    cluster.run("scontrol", "update", "nodename=node2", "state=resume", check=False)
    cluster.until(lambda: "down" not in nodes(cluster), "both nodes", 90)
    state = cluster.wait(job)
    # Slurm 22.05 loses count of the generic resources of a job that is requeued while one of its nodes is gone: they
    # stay taken, and no other test would get them.
    cluster.run("scontrol", "reconfigure")
    assert state == "COMPLETED", log(cluster, recipe)
    # Ranks whose daemon alone died live on, and may even finish before Slurm notices.
    assert restarted(cluster, job) or name == "daemon-killed"
    assert losses(run) == undisturbed


def test_a_crash_loop_stops_with_its_reason(cluster, recipes, tmp_path):
    recipe, _ = recipes("crashing")
    crash = "import os\nif os.environ.get('SLURM_PROCID') == '1':\n    os._exit(9)\n"
    job = submit(cluster, recipe, PYTHONPATH=start_python_with(tmp_path / "crash", crash))
    assert cluster.wait(job) == "FAILED", log(cluster, recipe)
    record = cluster.show(job)
    assert (record["ExitCode"], record["Restarts"]) == (f"{EXIT_NO_PROGRESS}:0", "3")
    assert "started 4 times without a checkpoint after step 0" in log(cluster, recipe)
