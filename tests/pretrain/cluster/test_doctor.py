"""What the doctor says of this machine, and of machines that lack something."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pretrain.cluster import doctor


@pytest.fixture(scope="module")
def findings():
    return {finding.name: finding for finding in doctor.examine()}


def test_everything_a_run_stumbles_over_is_looked_at(findings):
    assert platform.python_version() in findings["python"].detail
    expected = ["torch", "accelerator", "deepspeed", "ninja", "MPI", "Slurm", "hub", "wandb"]
    assert not set(expected) - set(findings)
    assert {"C++ compiler", "DeepSpeed operators"} <= set(findings)


def test_what_is_not_there_comes_with_advice(findings):
    assert all(finding.advice for finding in findings.values() if finding.state != "ok")


def test_this_environment_can_train(findings):
    assert not [finding for finding in findings.values() if finding.state == "broken"]


def empty_path(tmp_path: Path) -> dict[str, str]:
    environ = {**os.environ, "PATH": str(tmp_path), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    environ.pop("CXX", None)
    return environ


def test_the_command_on_a_machine_with_no_tools(tmp_path):
    command = [sys.executable, "-m", "pretrain.cli.main", "doctor"]
    done = subprocess.run(command, env=empty_path(tmp_path), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    for advice in ("apt-get install g++", "no sbatch here", "switched off by HF_HUB_OFFLINE"):
        assert advice in done.stdout


def test_little_shared_memory_ends_training_on_gpus_alone(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64 * 2**20))
    states = []
    for present in (False, True):
        monkeypatch.setattr(doctor, "accelerator_present", lambda present=present: present)
        states.append(doctor._shared_memory().state)
    assert states == ["absent", "broken"]


def test_an_unwritable_build_folder_is_broken(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    finding = doctor._operators()
    assert finding.state == "broken"
    assert "TORCH_EXTENSIONS_DIR" in finding.advice


def test_an_address_that_does_not_answer_does_not_hang(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    finding = doctor._hub()
    assert finding.state == "absent"
    assert "127.0.0.1:9" in finding.detail
