"""The batch scripts' own program where there is no Slurm: what it would start, and what it needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.environment import clean_environment
from pretrain.signals import EXIT_USER
from tests.pretrain.support import ROOT

FOUR_TASKS = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS": "4", "SLURM_CPUS_ON_NODE": "4"}


@pytest.fixture
def started(tmp_path):
    """Runs a kind of job with an srun that only writes down its arguments; returns them and the exit code."""
    calls = tmp_path / "calls"
    calls.touch()
    (tmp_path / "srun").write_text(f'#!/bin/sh\necho "$*" >>{calls}\n', encoding="utf-8")
    (tmp_path / "srun").chmod(0o755)

    def run(*arguments: str, **environ: str) -> tuple[list[str], int]:
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        variables = {**clean_environment(), "PATH": path, **environ}
        done = subprocess.run([sys.executable, "-m", "pretrain.cluster.job", *arguments], env=variables, cwd=tmp_path)
        return calls.read_text(encoding="utf-8").splitlines(), done.returncode

    return run


PREP = ("prep", "text.jsonl", "--out", "data", "--tokenizer", "words.model")


@pytest.mark.parametrize(
    ("image", "before", "python"),
    [
        ("", "", sys.executable),
        ("/mor.sif", "apptainer exec --nv --bind {root},{here} /mor.sif ", "python"),
        ("/mor.sqsh", "--container-workdir={here} ", "python"),
    ],
)
def test_mpi_ranks_run_where_the_others_do(started, tmp_path, image, before, python):
    calls, code = started(*PREP, **FOUR_TASKS, MOR_CONTAINER=image)
    assert code == 0
    (call,) = calls
    assert "--mpi=pmix" in call.split()
    before = before.format(root=ROOT, here=tmp_path)
    assert call.endswith(f"{before}{python} -u -m pretrain.cli.main prep tokenize {' '.join(PREP[1:])} --mpi")
    assert ("--container-image=/mor.sqsh" in call) == (image == "/mor.sqsh")


def test_outside_a_job_it_says_how_to_start_one(started):
    assert started(*PREP) == ([], EXIT_USER)


def test_a_node_needs_no_packages_for_it():
    # The packages may be inside the container only.
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport pretrain.cluster.job as job, pretrain.cluster.tasks"
    )
    program += "\nimport pretrain.cluster.health\nprint(job.__file__)"
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == ROOT / "pretrain" / "cluster" / "job.py"
