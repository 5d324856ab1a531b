"""Nodes that are not fit are named before training, and left out where there are others."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tests.pretrain.support import losses
from tests.slurm.stand_ins import EQUALLY_FAST, start_python_with
from tests.slurm.training import log, submit

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


def unfit(folder: Path, node: str, lines: str) -> str:
    """A PYTHONPATH with which Python on `node` has this fault, and which makes all nodes equally fast."""
    here = f"import os\nif os.environ.get('SLURMD_NODENAME') == {node!r}:"
    return start_python_with(folder, EQUALLY_FAST + here + textwrap.indent(lines, "    "))


def test_a_node_that_does_not_see_the_shared_folder_is_left_out(cluster, recipes, undisturbed, tmp_path):
    file, run = recipes("healthy")
    broken = unfit(tmp_path / "blind", "node2", BLIND)
    # One node more than the job needs.
    job = submit(cluster, file, "--partition=all", PYTHONPATH=broken, MOR_HEALTH="exclude")
    assert cluster.wait(job) == "COMPLETED", log(cluster, file)
    text = log(cluster, file)
    assert "node node2 is not fit: wrote no report" in text
    assert "node1 is not fit" not in text and "node3 is not fit" not in text
    record = cluster.show(job)
    assert (record["ExcNodeList"], record["NodeList"], record["Restarts"]) == ("node2", "node[1,3]", "1")
    assert losses(run) == undisturbed


def test_nothing_starts_where_no_node_can_replace_one_whose_clock_is_off(cluster, recipes, tmp_path):
    file, run = recipes("late")
    job = submit(cluster, file, PYTHONPATH=unfit(tmp_path / "late", "node2", LATE), MOR_HEALTH="exclude")
    assert cluster.wait(job) == "FAILED", log(cluster, file)
    text = log(cluster, file)
    assert "node node2 is not fit: its clock is +90 s off" in text and "node1 is not fit" not in text
    assert "fewer than 2 other nodes" in text
    assert not run.exists() and cluster.show(job)["Restarts"] == "0"
