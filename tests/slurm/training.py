"""Tiny training jobs on the test cluster."""

from __future__ import annotations

from pathlib import Path

from tests.pretrain.support import last_step
from tests.slurm.cluster import Cluster, script

STEPS = 24
TWO_NODES = ("--nodes=2", "--time=60", "--ntasks-per-node=1", "--gpus-per-node=1", "--mem=1500")


def submit(cluster: Cluster, recipe: Path, *options: str, **environ: str) -> str:
    """`sbatch slurm/train.sbatch RECIPE` on two nodes; the job's number."""
    # The GPUs of the test cluster are none that torch could use.
    environ = {"DS_ACCELERATOR": "cpu", **environ}
    return cluster.submit(*TWO_NODES, f"--output={recipe.stem}.out", *options, script("train"), str(recipe), **environ)


def log(cluster: Cluster, recipe: Path) -> str:
    return (cluster.work / f"{recipe.stem}.out").read_text()


def reached(cluster: Cluster, run: Path, step: int) -> None:
    """Wait until the run has logged this step."""
    cluster.until(lambda: last_step(run) >= step, f"step {step}")


def restarted(cluster: Cluster, job: str) -> bool:
    """Whether the job has been put back into the queue."""
    return cluster.show(job)["Restarts"] != "0"
