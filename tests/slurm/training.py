"""Tiny training jobs on the test cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.pretrain.support import last_step, recipe_values, tiny_model, write_recipe
from tests.slurm.cluster import JOB_PATH, Cluster

SCRIPT = str(Path(__file__).resolve().parents[2] / "slurm" / "train.sbatch")
STEPS = 24
TWO_NODES = ("--nodes=2", "--time=60", "--ntasks-per-node=1", "--gpus-per-node=1", "--mem=1500")
Recipes = Callable[..., tuple[Path, Path]]


def recipe_writer(cluster: Cluster, data: Path) -> Recipes:
    """A function that writes a recipe of STEPS steps for this cluster and names its file and run folder."""

    def write(name: str, **changes) -> tuple[Path, Path]:
        run = cluster.folder / "work" / "runs" / name
        standard = {"model": tiny_model(), "checkpoint": {"every": 1000}, "budget": {"steps": STEPS}}
        values = recipe_values(data, run, **{**standard, **changes})
        return write_recipe(cluster.folder / "work" / f"{name}.yaml", {**values, "name": name}), run

    return write


def submit(cluster: Cluster, recipe: Path, *options: str, **environ: str) -> str:
    """`sbatch slurm/train.sbatch RECIPE` on two nodes; the job's number."""
    output = f"--output={recipe.stem}.out"
    # The GPUs of the test cluster are none that torch could use.
    setup = {"MOR_SETUP": "true", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": JOB_PATH}
    return cluster.submit(*TWO_NODES, output, *options, SCRIPT, str(recipe), **{**setup, **environ})


def log(cluster: Cluster, recipe: Path) -> str:
    return (cluster.folder / "work" / f"{recipe.stem}.out").read_text()


def reached(run: Path, step: int) -> str | None:
    """Whether the run has logged this step."""
    return "yes" if last_step(run) >= step else None


def restarted(cluster: Cluster, job: str, times: int = 1) -> str | None:
    """Whether the job has been put back into the queue so many times."""
    return "yes" if int(cluster.show(job)["Restarts"]) >= times else None
