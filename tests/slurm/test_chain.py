"""`mor submit` on a real cluster: from text to report, and what Slurm would refuse."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, most_at_once
from tests.slurm.corpus import finished, write_whole_experiment
from tests.slurm.stand_ins import EQUALLY_FAST, start_python_with

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm")]
NODES = ("--nodes=2", "--gpus-per-node=1", "--time=60")


def mor(cluster: Cluster, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    jobs = str(cluster.work / "jobs.jsonl")
    clusters = str(cluster.work / "clusters.yaml")
    command = [sys.executable, "-m", "pretrain.cli.main", *arguments]
    environ = {"MOR_JOBS": jobs, "MOR_CLUSTERS": clusters, "OMP_NUM_THREADS": "1", "COLUMNS": "250", **variables}
    return cluster.run(*command, check=False, **environ)


@pytest.fixture(scope="module")
def experiment(cluster) -> tuple[Path, Path]:
    return write_whole_experiment(cluster.work, "chain")


def test_a_dry_run_and_what_slurm_would_refuse_submit_nothing(cluster, experiment):
    file, folder = experiment
    for options, reason in (
        (["--partition=nowhere"], "partition"),
        (["--constraint=fast"], "feature"),
        (["base.batch.micro_batch=2", "--nodes=4", "--gpus-per-node=1"], "node configuration is not available"),
        (["--time=yesterday"], "time limit"),
        (["--gpus-per-node=7"], "micro_batch"),
    ):
        done = mor(cluster, "submit", str(file), *options)
        assert done.returncode == 2 and reason in done.stderr.lower(), done.stdout + done.stderr
    assert cluster.is_empty() and not folder.exists()
    done = mor(cluster, "submit", str(file), *NODES, "--dry-run")
    assert done.returncode == 0, done.stderr
    scripts = [line.split(".sbatch")[0].rsplit("/", 1)[1] for line in done.stdout.splitlines() if ".sbatch" in line]
    assert scripts == ["compare", "train", "eval", "train", "eval", "compare"]
    assert cluster.is_empty() and not folder.exists()


def chain(cluster: Cluster, file: Path, *options: str) -> dict[str, str]:
    """Submit an experiment and wait for its end; returns the job numbers by the names of the steps."""
    done = mor(cluster, "submit", str(file), *NODES, *options)
    assert done.returncode == 0, done.stderr
    cluster.until(cluster.is_empty, "the chain", 480)
    jobs = re.findall(r"^ *(\d+)  sbatch .*?--job-name=(\S+)", done.stdout, re.MULTILINE)
    return {name: number for number, name in jobs}


@pytest.mark.slow
def test_from_text_to_report(cluster, experiment):
    file, folder = experiment
    numbers = chain(cluster, file, "--limit=1")
    jobs = mor(cluster, "jobs").stdout
    assert jobs.count("COMPLETED") == 6, jobs + cluster.logs()
    assert finished(folder) == ["mor", "vanilla"]
    assert "12/12" in jobs
    table = (folder / "report" / "report.csv").read_text()
    assert "perplexity" in table and "mor" in table
    times = {name: cluster.interval(number) for name, number in numbers.items()}
    training, evaluation = ([times[f"tiny-{arm}{end}"] for arm in ("vanilla", "mor")] for end in ("", "-eval"))
    assert most_at_once(training) == 1, "--limit=1 was not kept"
    assert times["tiny-prepare"][1] <= min(start for start, _ in training)
    assert all(before[1] <= after[0] for before, after in zip(training, evaluation))
    assert max(end for _, end in evaluation) <= times["tiny-report"][0]


@pytest.mark.slow
def test_a_failing_arm_ends_its_own_evaluation_and_not_the_report(cluster):
    file, folder = write_whole_experiment(cluster.work, "half")
    # As if somebody had asked this arm to stop before it began: it fails, and is not requeued.
    (folder / "mor").mkdir(parents=True)
    (folder / "mor" / "stop").touch()
    states = {name: cluster.state(number) for name, number in chain(cluster, file).items()}
    assert states == {
        "tiny-prepare": "COMPLETED",
        "tiny-vanilla": "COMPLETED",
        "tiny-vanilla-eval": "COMPLETED",
        "tiny-mor": "FAILED",
        "tiny-mor-eval": "CANCELLED",
        "tiny-report": "COMPLETED",
    }, cluster.logs()
    report = (folder / "report" / "report.md").read_text()
    assert "runs/half/mor: training was stopped at step 1 of 12" in report, report


@pytest.mark.slow
def test_the_doctor_writes_one_page_about_both_nodes(cluster, tmp_path):
    path = start_python_with(tmp_path / "python", EQUALLY_FAST)
    done = mor(cluster, "doctor", "--cluster=default", "--nodes=2", PYTHONPATH=path)
    lines = done.stdout.splitlines()
    about = {line.split()[1]: line for line in lines if re.match(r"ok +node\d", line)}
    assert sorted(about) == ["node1", "node2"], done.stdout + done.stderr
    for facts in ("matrix product", "all-reduce of all", "with a neighbour", "clock", "meets by srun, 127.0.0.1:"):
        assert all(facts in line for line in about.values()), done.stdout
    assert lines[-1] == "2 of 2 nodes are fit to train together."
    assert len(lines) < 60
    assert not list((cluster.work).glob(".health-*"))
