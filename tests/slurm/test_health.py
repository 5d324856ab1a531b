"""Nodes that are not fit are named before training, and left out where there are others."""

from __future__ import annotations

import shutil
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pretrain.support import losses
from tests.slurm.cluster import Cluster, local_cluster
from tests.slurm.stand_ins import EQUALLY_FAST, start_python_with
from tests.slurm.training import log, recipe_writer, submit

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm")]
# What makes a node unfit: Python on that node alone starts with these lines.
BLIND = """
import os
really_open = os.open
def open_elsewhere(path, *rest, **named):
    if ".health-" in os.fsdecode(path):
        raise FileNotFoundError(2, "the shared file system is not mounted here", path)
    return really_open(path, *rest, **named)
os.open = open_elsewhere
"""
LATE = """
import time
really = time.time
time.time = lambda: really() + 90
"""


@pytest.fixture(scope="module")
def three_nodes(cluster) -> Iterator[Cluster]:
    """A cluster with one node more than the jobs need."""
    folder = Path(tempfile.mkdtemp(prefix="mor-slurm-", dir="/tmp"))
    try:
        with local_cluster(folder, nodes=3) as running:
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def recipe(three_nodes, training_data) -> tuple[Path, Path]:
    """The undisturbed run's recipe on three nodes: its file and its run folder."""
    return recipe_writer(three_nodes, training_data)("healthy")


def unfit(folder: Path, node: str, lines: str) -> str:
    """A PYTHONPATH with which Python on `node` has this fault, and which makes all nodes equally fast."""
    here = f"import os\nif os.environ.get('SLURMD_NODENAME') == {node!r}:"
    return start_python_with(folder, EQUALLY_FAST + here + textwrap.indent(lines, "    "))


def test_a_node_that_does_not_see_the_shared_folder_is_left_out(three_nodes, recipe, undisturbed, tmp_path):
    file, run = recipe
    broken = unfit(tmp_path / "blind", "node2", BLIND)
    job = submit(three_nodes, file, PYTHONPATH=broken, MOR_HEALTH="exclude")
    assert three_nodes.wait(job) == "COMPLETED", log(three_nodes, file)
    text = log(three_nodes, file)
    assert "node node2 is not sound: wrote no report" in text
    assert "node1 is not sound" not in text and "node3 is not sound" not in text
    record = three_nodes.show(job)
    assert (record["ExcNodeList"], record["NodeList"], record["Restarts"]) == ("node2", "node[1,3]", "1")
    assert losses(run) == undisturbed


def test_a_clock_that_is_off_is_named(three_nodes, recipe, tmp_path):
    file, run = recipe
    shutil.rmtree(run, ignore_errors=True)
    broken = unfit(tmp_path / "late", "node3", LATE)
    job = submit(three_nodes, file, "--nodelist=node[1,3]", PYTHONPATH=broken, MOR_HEALTH="check")
    assert three_nodes.wait(job) == "FAILED", log(three_nodes, file)
    assert "node node3 is not sound: its clock is +90 s off" in log(three_nodes, file)
    assert not run.exists() and three_nodes.show(job)["Restarts"] == "0"
