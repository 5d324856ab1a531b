"""One cluster for all tests of this folder; each test has its own work folder in it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import skip_or_fail
from tests.pretrain.support import losses, make_dataset, recipe_values, tiny_model, write_recipe
from tests.slurm.cluster import Cluster, local_cluster, missing_programs
from tests.slurm.corpus import prep_arguments, write_text_files
from tests.slurm.training import STEPS, log, submit


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Three nodes of two processors and two GPUs each, two of them in the default partition; shared by the tests."""
    if missing := missing_programs():
        skip_or_fail(
            f"{', '.join(missing)} not installed; on Debian as root: "
            "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"
        )
    # A short path: sockets live in it.
    folder = Path(tempfile.mkdtemp(prefix="mor-slurm-", dir="/tmp"))
    try:
        with local_cluster(folder, nodes=3) as running:
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def recipes(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory):
    """A function that writes a recipe of STEPS steps for this cluster and returns its file and run folder."""
    data = make_dataset(tmp_path_factory.mktemp("data") / "set")

    def write(name: str, **changes) -> tuple[Path, Path]:
        run = cluster.work / "runs" / name
        standard = {"model": tiny_model(), "checkpoint": {"every": 1000}, "budget": {"steps": STEPS}}
        values = recipe_values(data, run, **{**standard, **changes})
        return write_recipe(cluster.work / f"{name}.yaml", {**values, "name": name}), run

    return write


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, recipes) -> dict[int, float]:
    """Losses of a run that nothing disturbs."""
    recipe, run = recipes("undisturbed")
    job = submit(cluster, recipe)
    assert cluster.wait(job) == "COMPLETED", log(cluster, recipe)
    return losses(run)


@pytest.fixture(scope="session")
def corpus(cluster) -> Path:
    """Text files, and a tokenizer of their words."""
    folder = write_text_files(cluster.work / "text")
    command = [sys.executable, "-m", "data_prep", "tokenizer", "train", str(folder / "*.jsonl")]
    command += ["--out", str(folder / "words.model"), "--vocab-size", "300"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def prepared(corpus) -> Path:
    """The data set as one process without Slurm makes it."""
    out = corpus.parent / "one-process"
    command = [sys.executable, "-m", "data_prep", "tokenize", *prep_arguments(corpus, out)]
    subprocess.run(command, check=True, capture_output=True)
    return out
