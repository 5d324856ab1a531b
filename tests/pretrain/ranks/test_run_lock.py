"""One job at a time trains in a run folder, and all its ranks see the same one."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from data_prep.locks import locked
from pretrain.errors import RunError
from pretrain.ranks import run_lock
from pretrain.ranks.run_lock import sole_job
from tests.pretrain.checkpoints.test_resume import finished_checkpoints
from tests.pretrain.collectives import Threads
from tests.pretrain.support import ALONE, Job, Nursery, Workers, losses, metrics, recipe_values, write_recipe
from tests.pretrain.training.test_stopping import run_with


@pytest.mark.parametrize(
    ("number", "message"), [(errno.EAGAIN, "another job is training there"), (errno.EIO, "cannot be begun there")]
)
def test_a_folder_that_is_taken_or_cannot_be_locked_is_refused_on_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_lock, "_PATIENCE", 0.0)
    monkeypatch.setattr(fcntl, "lockf", fail)

    def enter(rank: int) -> None:
        with sole_job(tmp_path, dataclasses.replace(ALONE, rank=rank, world_size=2)):
            pass

    for error in Threads(2, monkeypatch).each(enter):
        assert isinstance(error, RunError) and message in str(error)


def test_ranks_that_do_not_share_the_run_folder_are_named(tmp_path: Path, tiny_data: Path, nursery: Nursery) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", recipe_values(tiny_data, tmp_path / "run"))
    codes, printed, _ = run_with(nursery, recipe, blind=[1])
    assert codes == [2, 2] and "rank 1 on " in printed and "a file system that all nodes share" in printed, printed
    assert not (tmp_path / "run" / "recipe.yaml").exists()


@pytest.mark.slow
def test_a_second_job_that_has_waited_takes_nothing_back(
    tmp_path: Path, tiny_data: Path, one_rank: Workers, nursery: Nursery
) -> None:
    """A larger budget submitted twice: the second job saw a folder with the old one, and gets the lock with the new."""
    values = recipe_values(tiny_data, tmp_path / "run", budget={"steps": 12}, checkpoint={"every": 4, "keep": 9})
    run = one_rank.train(tmp_path, values)
    larger = {**values, "budget": {"steps": 16}}
    shutil.copytree(run, tmp_path / "first")
    done = one_rank.train(tmp_path, {**larger, "run_dir": str(tmp_path / "first")})
    with locked(run / run_lock.LOCK_FILE, "taken"):
        job = Job(write_recipe(tmp_path / "larger.yaml", larger), nursery=nursery)
        said = job.processes[0]._folder / "errors"
        while job.running and "waiting for it" not in said.read_text(encoding="utf-8"):
            time.sleep(0.05)
        for entry in run.iterdir():
            if entry.name != run_lock.LOCK_FILE:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        shutil.copytree(done, run, dirs_exist_ok=True, ignore=shutil.ignore_patterns(run_lock.LOCK_FILE))
    codes, output, errors = job.wait()
    assert codes == [0], output + errors
    assert finished_checkpoints(run) == finished_checkpoints(done) == [4, 8, 12, 16]
    assert (run / "weights" / "model.safetensors").is_file() and losses(run) == losses(done)
    assert metrics(run, "event") == metrics(done, "event"), "nothing was trained again"
