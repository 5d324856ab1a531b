"""One job at a time trains in a run folder, and all its ranks see the same one."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data_prep.locks import lock
from data_prep.tokenizing.pipeline import only_writer
from pretrain.errors import RunError
from pretrain.ranks import run_lock
from tests.pretrain.checkpoints.test_resume import finished_checkpoints
from tests.pretrain.support import (
    ROOT,
    Job,
    Nursery,
    Workers,
    losses,
    metrics,
    recipe_values,
    write_recipe,
)
from tests.pretrain.training.test_stopping import run_with

HOLDER = """
import sys
from pathlib import Path
from pretrain.ranks.run_lock import take
stream, _ = take(Path(sys.argv[1]), 0.0)
print("taken", flush=True)
sys.stdin.read()
"""


def test_a_second_job_in_a_run_folder_is_refused_and_a_killed_one_leaves_it_free(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "taken\n"
        with pytest.raises(RunError, match=rf'another job is training there .*"process": {holder.pid}\b'):
            run_lock.take(folder, 0.0)
    finally:
        holder.kill()
        holder.communicate()
    stream, text = run_lock.take(folder, 0.0)
    assert run_lock.sees(folder, text, 0.0) and not run_lock.sees(folder, text + "?", 0.0)
    stream.close()


@pytest.mark.parametrize("code", ["ENOLCK", "ENOSYS", "EOPNOTSUPP", "EINVAL"])
def test_a_file_system_without_locks_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Whatever is locked: a run folder, a data set that is written, what others are waited for."""

    def without(number: int) -> None:
        def refuse(*_: Any) -> None:
            raise OSError(number, os.strerror(number))

        for name in ("lockf", "flock"):
            monkeypatch.setattr(fcntl, name, refuse)

    without(getattr(errno, code))
    stream, text = run_lock.take(tmp_path, 0.0)
    assert json.loads(text)["process"] == os.getpid()
    stream.close()
    with only_writer(tmp_path, ""), (tmp_path / "lock").open("w") as other:
        assert lock(other) and lock(other, wait=True)
    without(errno.EIO)
    with pytest.raises(RunError, match="cannot be begun there"):
        run_lock.take(tmp_path, 0.0)


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
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert holder.stdout is not None and holder.stdout.readline() == "taken\n"
    job = Job(write_recipe(tmp_path / "larger.yaml", larger), nursery=nursery)
    said = job.processes[0]._folder / "errors"
    while job.running and "waiting for a job" not in said.read_text(encoding="utf-8"):
        time.sleep(0.05)
    for entry in run.iterdir():
        if entry.name != run_lock.LOCK_FILE:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    shutil.copytree(done, run, dirs_exist_ok=True, ignore=shutil.ignore_patterns(run_lock.LOCK_FILE))
    holder.kill()
    holder.communicate()
    codes, output, errors = job.wait()
    assert codes == [0], output + errors
    assert finished_checkpoints(run) == finished_checkpoints(done) == [4, 8, 12, 16]
    assert (run / "weights" / "model.safetensors").is_file() and losses(run) == losses(done)
    assert metrics(run, "event") == metrics(done, "event"), "nothing was trained again"
