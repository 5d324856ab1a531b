"""`mor submit` on a real cluster: from text to report, and what Slurm would refuse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.slurm.cluster import Cluster
from tests.slurm.test_tasks import finished, write_experiment, write_text_files

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm")]
NODES = ("--nodes=2", "--gpus-per-node=1", "--time=60")


def mor(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    jobs = str(cluster.folder / "work" / "jobs.jsonl")
    clusters = str(cluster.folder / "work" / "clusters.yaml")
    command = [sys.executable, "-m", "pretrain.cli.main", *arguments]
    environ = {"MOR_JOBS": jobs, "MOR_CLUSTERS": clusters, "OMP_NUM_THREADS": "1", "COLUMNS": "250"}
    return cluster.run(*command, check=False, **environ)


@pytest.fixture(scope="module")
def experiment(cluster) -> tuple[Path, Path]:
    """An experiment whose text is not prepared yet."""
    work = cluster.folder / "work"
    text = write_text_files(work / "chain-text")
    folder = work / "runs" / "chain"
    file = write_experiment(work / "chain.yaml", folder, work / "chain-data")
    values = yaml.safe_load(file.read_text())
    values["data"] |= {"corpus": str(text / "*.jsonl"), "tokenizer": "train", "vocab_size": 300, "test": 0.05}
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file, folder


def test_what_slurm_would_refuse_is_refused_before_anything_is_submitted(cluster, experiment):
    file, folder = experiment
    for options, reason in (
        (["--partition=nowhere"], "partition"),
        (["--constraint=fast"], "feature"),
        (["--gpus-per-node=7"], "micro_batch"),
    ):
        done = mor(cluster, "submit", str(file), *options)
        assert done.returncode == 2 and reason in done.stderr.lower(), done.stdout + done.stderr
    assert not cluster.run("squeue", "-h").stdout.strip()
    assert not folder.exists()


def test_a_dry_run_shows_the_chain_and_sends_nothing(cluster, experiment):
    file, folder = experiment
    done = mor(cluster, "submit", str(file), *NODES, "--dry-run")
    assert done.returncode == 0, done.stderr
    scripts = [line.split(".sbatch")[0].rsplit("/", 1)[1] for line in done.stdout.splitlines() if ".sbatch" in line]
    assert scripts == ["compare", "train", "eval", "train", "eval", "compare"]
    assert not cluster.run("squeue", "-h").stdout.strip()
    assert not folder.exists()


@pytest.mark.slow
def test_from_text_to_report(cluster, experiment):
    file, folder = experiment
    done = mor(cluster, "submit", str(file), *NODES, "--limit=1")
    assert done.returncode == 0, done.stderr
    cluster.until(lambda: "yes" if not cluster.run("squeue", "-h").stdout.strip() else None, "the chain", 480)
    jobs = mor(cluster, "jobs").stdout
    assert jobs.count("COMPLETED") == 6, jobs + cluster.logs()
    assert finished(folder) == ["mor", "vanilla"]
    assert "12/12" in jobs
    table = (folder / "report" / "report.csv").read_text()
    assert "perplexity" in table and "mor" in table


@pytest.mark.slow
def test_the_doctor_examines_both_nodes(cluster):
    done = mor(cluster, "doctor", "--cluster", "--nodes=2")
    lines = {line.split()[1]: line for line in done.stdout.splitlines() if " node" in line and "all-reduce" in line}
    assert sorted(lines) == ["node1", "node2"], done.stdout + done.stderr
    assert not list((cluster.folder / "work").glob(".health-*"))
