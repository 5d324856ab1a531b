"""What the doctor says of this machine, and of one that lacks tools."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from pretrain.cluster.doctor import examine


@pytest.fixture(scope="module")
def findings():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
        return examine()


def test_everything_that_training_uses_is_examined(findings):
    assert platform.python_version() in findings["python"].detail
    expected = {"torch", "accelerator", "bfloat16", "deepspeed", "ninja", "MPI", "Slurm", "hub", "wandb", "memory"}
    assert not {*expected, "C++ compiler", "DeepSpeed operators", "shared memory", "disk"} - set(findings)
    assert all(finding.advice for finding in findings.values() if finding.state != "ok")
    assert not [finding for finding in findings.values() if finding.state == "broken"], "this environment can train"
    assert findings["hub"].state == "absent" and "127.0.0.1:9" in findings["hub"].detail


def test_the_command_on_a_machine_with_no_tools(tmp_path):
    environ = {**os.environ, "PATH": str(tmp_path), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    environ.pop("CXX", None)
    command = [sys.executable, "-m", "pretrain.cli.main", "doctor"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    for advice in ("apt-get install g++", "no sbatch here", "switched off by HF_HUB_OFFLINE"):
        assert advice in done.stdout
