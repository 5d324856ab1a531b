"""One cluster for all tests of this folder; each test has its own work folder in it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import skip_or_fail
from tests.pretrain.support import losses, make_dataset
from tests.slurm.cluster import Cluster, local_cluster, missing_programs
from tests.slurm.training import Recipes, log, recipe_writer, submit


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes of two processors and two GPUs each, shared by the tests."""
    if missing := missing_programs():
        skip_or_fail(
            f"{', '.join(missing)} not installed; on Debian as root: "
            "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"
        )
    # A short path: sockets live in it.
    folder = Path(tempfile.mkdtemp(prefix="mor-slurm-", dir="/tmp"))
    try:
        with local_cluster(folder) as running:
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def recipes(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Recipes:
    """Writes recipes for this cluster; the data set is made once."""
    return recipe_writer(cluster, make_dataset(tmp_path_factory.mktemp("data") / "set"))


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, recipes: Recipes) -> dict[int, float]:
    """Losses of a run that nothing disturbs."""
    recipe, run = recipes("undisturbed")
    job = submit(cluster, recipe)
    assert cluster.wait(job) == "COMPLETED", log(cluster, recipe)
    return losses(run)
