"""The cluster the other tests stand on: real jobs, an ordinary user's, and nothing left behind."""

from __future__ import annotations

import multiprocessing
import os
import pwd
import shutil
import tempfile
from pathlib import Path

import psutil
import pytest

from tests.slurm.cluster import local_cluster

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm")]

JOB = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=2 --gpus-per-node=2
srun bash -c 'echo $SLURM_PROCID $SLURM_NODEID $SLURM_LOCALID $CUDA_VISIBLE_DEVICES'
"""


def run_one_job(folder: Path) -> list[int]:
    """A job on two nodes of a cluster of its own; the daemons' process numbers."""
    with local_cluster(folder, nodes=2) as cluster:
        script = folder / "work" / "job.sh"
        script.write_text(JOB)
        job = cluster.submit("--output=job.out", str(script))
        assert cluster.wait(job) == "COMPLETED", cluster.logs()
        lines = sorted((folder / "work" / "job.out").read_text().split("\n"))
        assert lines == ["", "0 0 0 0,1", "1 0 1 0,1", "2 1 0 0,1", "3 1 1 0,1"]
        return [daemon.pid for daemon in cluster.daemons.values()]


def as_nobody(folder: str, user: int, group: int) -> None:
    os.setgroups([])
    os.setgid(group)
    os.setuid(user)
    os.environ.update(HOME=folder, TMPDIR=folder, USER="nobody", LOGNAME="nobody")
    Path(folder, "daemons").write_text(" ".join(map(str, run_one_job(Path(folder)))))


def test_an_ordinary_user_can_have_one_and_nothing_stays(cluster):
    # Beside the cluster of the other tests, on ports of its own.
    folder = Path(tempfile.mkdtemp(prefix="mor-slurm-", dir="/tmp"))
    try:
        if os.getuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
            arguments = (str(folder), nobody.pw_uid, nobody.pw_gid)
            # Not a fork: other tests may have left threads here, whose locks would stay locked in it.
            process = multiprocessing.get_context("spawn").Process(target=as_nobody, args=arguments)
            process.start()
            process.join()
            assert process.exitcode == 0
            daemons = [int(number) for number in (folder / "daemons").read_text().split()]
        else:
            daemons = run_one_job(folder)
        assert len(daemons) == 4 and not any(map(psutil.pid_exists, daemons))
        assert "idle" in cluster.run("sinfo", "-h", "-o", "%T").stdout, "another cluster was disturbed"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
