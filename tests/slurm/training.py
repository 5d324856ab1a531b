"""Tiny training jobs on the test cluster."""

from __future__ import annotations

from pathlib import Path

from tests.pretrain.support import last_step
from tests.slurm.cluster import JOB_PATH, Cluster

SCRIPT = str(Path(__file__).resolve().parents[2] / "slurm" / "train.sbatch")
STEPS = 24
TWO_NODES = ("--nodes=2", "--time=60", "--ntasks-per-node=1", "--gpus-per-node=1", "--mem=1500")


def submit(cluster: Cluster, recipe: Path, *options: str, **environ: str) -> str:
    """`sbatch slurm/train.sbatch RECIPE` on two nodes; the job's number."""
    output = f"--output={recipe.stem}.out"
    # The GPUs of the test cluster are none that torch could use.
    setup = {"MOR_SETUP": "true", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": JOB_PATH}
    return cluster.submit(*TWO_NODES, output, *options, SCRIPT, str(recipe), **{**setup, **environ})


def log(cluster: Cluster, recipe: Path) -> str:
    return (cluster.work / f"{recipe.stem}.out").read_text()


def reached(cluster: Cluster, run: Path, step: int) -> None:
    """Wait until the run has logged this step."""
    cluster.until(lambda: last_step(run) >= step, f"step {step}")


def restarted(cluster: Cluster, job: str) -> bool:
    """Whether the job has been put back into the queue."""
    return cluster.show(job)["Restarts"] != "0"
