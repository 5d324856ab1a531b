"""Preparing, evaluating and comparing through the scripts of slurm/, as arrays and as MPI ranks."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import skip_or_fail
from tests.slurm.cluster import most_at_once, script
from tests.slurm.corpus import finished, prep_arguments, write_experiment

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm")]


def shards(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*-0*.*"))}


def test_an_array_of_tasks_and_its_merge_make_what_one_process_makes(cluster, corpus, prepared):
    out, gate = cluster.work / "array", cluster.work / "array-gate"
    gate.mkdir()
    # Every element waits at the gate, so that how many are there at once does not depend on how fast they are.
    wait = f"touch {gate}/$SLURM_ARRAY_TASK_ID; until [ -e {gate}/open ]; do sleep 0.1; done"
    arguments = [script("prep"), *prep_arguments(corpus, out)]
    job = cluster.submit("--array=0-3%2", "--output=prep-array-%a.out", *arguments, MOR_SETUP=wait)

    def states() -> list[str]:
        return sorted(cluster.run("squeue", "-h", "-r", "-j", job, "-o", "%T %r").stdout.splitlines())

    limited = ["PENDING JobArrayTaskLimit"] * 2 + ["RUNNING None"] * 2
    cluster.until(lambda: states() == limited and len(list(gate.iterdir())) == 2, "two at the gate")
    (gate / "open").touch()
    cluster.until((out / "manifest.json").is_file, "the merged data set")
    elements = [cluster.interval(f"{job}_{index}") for index in range(4)]
    assert most_at_once(elements) == 2
    logs = "".join(file.read_text() for file in (cluster.work).glob("prep-array-*.out"))
    (merge,) = re.findall(r"job (\d+) does `merge", logs)
    assert cluster.wait(merge) == "COMPLETED"
    assert cluster.interval(merge)[0] >= max(end for _, end in elements)
    assert shards(out) == shards(prepared)


@pytest.mark.slow
def test_mpi_ranks_make_what_one_process_makes(cluster, corpus, prepared):
    probe = cluster.run("srun", "--mpi=pmix", "true", check=False)
    if probe.returncode:
        skip_or_fail(f"Slurm cannot start MPI programs (Debian: apt-get install libpmix-dev): {probe.stderr}")
    out = cluster.work / "mpi"
    # Both nodes are this machine, whose shared memory real nodes do not have in common.
    over_tcp = {"OMPI_MCA_btl": "self,tcp", "OMPI_MCA_btl_tcp_if_include": "lo"}
    options = ("--nodes=2", "--ntasks-per-node=2", "--output=prep-mpi.out")
    job = cluster.submit(*options, script("prep"), *prep_arguments(corpus, out), **over_tcp)
    assert cluster.wait(job) == "COMPLETED", cluster.logs()
    assert shards(out) == shards(prepared)


@pytest.mark.slow
def test_an_experiment_and_its_evaluations_as_arrays(cluster, corpus, prepared):
    folder = cluster.work / "runs" / "array-experiment"
    experiment = write_experiment(cluster.work / "array-experiment.yaml", folder, prepared)
    job = cluster.submit("--array=0-1%1", "--output=compare-%a.out", script("compare"), str(experiment))
    cluster.until((folder / "report" / "report.csv").is_file, "the report")
    cluster.until(cluster.is_empty, "an empty queue")
    assert cluster.wait(f"{job}_0") == cluster.wait(f"{job}_1") == "COMPLETED", cluster.logs()
    assert most_at_once([cluster.interval(f"{job}_{element}") for element in range(2)]) == 1
    table = (folder / "report" / "report.csv").read_text()
    assert "vanilla" in table and "mor" in table

    assert finished(folder) == ["mor", "vanilla"]
    runs = [folder / name for name in finished(folder)]
    for run in runs:
        shutil.rmtree(run / "evaluation")
    suites = ("--suite", "perplexity", "--suite=routing")
    job = cluster.submit("--array=0-3", "--output=eval-%a.out", script("eval"), *map(str, runs), *suites)
    for element in range(4):
        assert cluster.wait(f"{job}_{element}") == "COMPLETED", cluster.logs()
    for run in runs:
        assert {file.stem for file in (run / "evaluation").glob("*.json")} == {"perplexity", "routing"}
