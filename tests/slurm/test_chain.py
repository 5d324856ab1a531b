"""`mor submit` on a real cluster: from text to report, and what Slurm would refuse."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pretrain.ranks.environment import clean_environment
from tests.slurm.cluster import Cluster, most_at_once
from tests.slurm.corpus import write_text_files
from tests.slurm.stand_ins import EQUALLY_FAST, start_python_with
from tests.slurm.test_tasks import finished, write_experiment

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm")]
NODES = ("--nodes=2", "--gpus-per-node=1", "--time=60")


def mor(cluster: Cluster, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    jobs = str(cluster.folder / "work" / "jobs.jsonl")
    clusters = str(cluster.folder / "work" / "clusters.yaml")
    command = [sys.executable, "-m", "pretrain.cli.main", *arguments]
    environ = {"MOR_JOBS": jobs, "MOR_CLUSTERS": clusters, "OMP_NUM_THREADS": "1", "COLUMNS": "250", **variables}
    return cluster.run(*command, check=False, **environ)


def untouched_text(work: Path, name: str) -> tuple[Path, Path]:
    """An experiment whose text is not prepared yet, in `work`: its file and its folder."""
    text = write_text_files(work / f"{name}-text")
    folder = work / "runs" / name
    file = write_experiment(work / f"{name}.yaml", folder, work / f"{name}-data")
    values = yaml.safe_load(file.read_text())
    values["data"] |= {"corpus": str(text / "*.jsonl"), "tokenizer": "train", "vocab_size": 300, "test": 0.05}
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file, folder


@pytest.fixture(scope="module")
def experiment(cluster) -> tuple[Path, Path]:
    return untouched_text(cluster.folder / "work", "chain")


def test_what_slurm_would_refuse_is_refused_before_anything_is_submitted(cluster, experiment):
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


def queue_is_empty(cluster: Cluster) -> str | None:
    return "yes" if not cluster.run("squeue", "-h").stdout.strip() else None


def submitted(printed: str) -> dict[str, str]:
    """Job numbers by the names of the steps, from what `mor submit` printed."""
    return {name: number for number, name in re.findall(r"^ *(\d+)  sbatch .*?--job-name=(\S+)", printed, re.MULTILINE)}


@pytest.mark.slow
def test_from_text_to_report(cluster, experiment):
    file, folder = experiment
    done = mor(cluster, "submit", str(file), *NODES, "--limit=1")
    assert done.returncode == 0, done.stderr
    cluster.until(lambda: queue_is_empty(cluster), "the chain", 480)
    jobs = mor(cluster, "jobs").stdout
    assert jobs.count("COMPLETED") == 6, jobs + cluster.logs()
    assert finished(folder) == ["mor", "vanilla"]
    assert "12/12" in jobs
    table = (folder / "report" / "report.csv").read_text()
    assert "perplexity" in table and "mor" in table
    times = {name: cluster.interval(number) for name, number in submitted(done.stdout).items()}
    training, evaluation = ([times[f"tiny-{arm}{end}"] for arm in ("vanilla", "mor")] for end in ("", "-eval"))
    assert most_at_once(training) == 1, "--limit=1 was not kept"
    assert times["tiny-prepare"][1] <= min(start for start, _ in training)
    assert all(before[1] <= after[0] for before, after in zip(training, evaluation))
    assert max(end for _, end in evaluation) <= times["tiny-report"][0]


@pytest.mark.slow
def test_a_failing_arm_ends_its_own_evaluation_and_not_the_report(cluster):
    file, folder = untouched_text(cluster.folder / "work", "half")
    # As if somebody had asked this arm to stop before it began: it fails, and is not requeued.
    (folder / "mor").mkdir(parents=True)
    (folder / "mor" / "stop").touch()
    done = mor(cluster, "submit", str(file), *NODES)
    assert done.returncode == 0, done.stderr
    cluster.until(lambda: queue_is_empty(cluster), "the chain", 480)
    states = {name: cluster.state(number) for name, number in submitted(done.stdout).items()}
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
def test_the_same_chain_without_slurm(tmp_path):
    file, folder = untouched_text(tmp_path, "alone")
    command = [sys.executable, "-m", "pretrain.cli.main", "submit", str(file), "--local"]
    environ = {**clean_environment(), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert finished(folder) == ["mor", "vanilla"]
    table = (folder / "report" / "report.csv").read_text()
    assert "perplexity" in table and "mor" in table


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
    assert not list((cluster.folder / "work").glob(".health-*"))
