"""What users and clusters do to a run: two jobs at once, folders that go away, disks that hiccup, other code."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_prep.locks import lock
from data_prep.pipeline import only_writer
from pretrain import checkpoint, run_lock
from pretrain.branches import seed_branch
from pretrain.checkpoint import TrainState
from pretrain.cli.runs import describe, find_runs
from pretrain.errors import RecipeError, RunError
from pretrain.finished import unfinished
from pretrain.hooks import check_suites_of
from pretrain.loop import Trainer
from pretrain.prepare import prepare
from pretrain.provenance import changes_since_last_start, describe_environment
from pretrain.recipe import build_recipe
from pretrain.run_folder import RunFolder
from pretrain.signals import Request, StopRequest
from pretrain.telemetry import Telemetry, rewind_metrics
from tests.pretrain.checkpoints import fake_checkpoint
from tests.pretrain.support import (
    ALONE,
    ROOT,
    Job,
    Nursery,
    Workers,
    environment,
    losses,
    metrics,
    recipe_values,
    write_recipe,
)
from tests.pretrain.test_faults import run_with as run_faulty
from tests.pretrain.test_hooks import values_of
from tests.pretrain.test_resume import finished_checkpoints
from tests.pretrain.test_runs import make_run
from tests.pretrain.test_stopping import run_with

HOLDER = """
import sys
from pathlib import Path
from pretrain.run_lock import take
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


@pytest.mark.parametrize("ranks", [[1], pytest.param([0, 1], marks=pytest.mark.slow)])
def test_an_evaluation_that_fails_is_left_out_on_all_ranks(
    tmp_path: Path, prose_data: Path, nursery: Nursery, ranks: list[int]
) -> None:
    suites = {"names": ["perplexity", "own"], "every": 4, "limit": 5}
    recipe = write_recipe(tmp_path / "r.yaml", values_of(prose_data, tmp_path / "run", every=4, suites=suites))
    codes, printed, passes = run_with(nursery, recipe, fail_suite=ranks)
    assert codes == [0, 0], printed
    assert passes[0] == passes[1] > 0
    failed = [e for e in metrics(tmp_path / "run", "event") if e["event"] == "evaluation_failed"]
    assert [(e["step"], e["what"]) for e in failed] == [(4, "suites"), (8, "suites")]
    assert f"rank {ranks[0]}: OSError" in failed[0]["problem"] and "a disk that is gone" in failed[0]["problem"]
    assert {r["step"] for r in metrics(tmp_path / "run", "validation")} == {4, 8}
    assert not metrics(tmp_path / "run", "evaluation") and sorted(losses(tmp_path / "run")) == list(range(1, 9))


def test_a_harness_that_is_not_installed_is_missed_before_training(
    tmp_path: Path, prose_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))

    def check(*names: str) -> None:
        check_suites_of(build_recipe(recipe_values(prose_data, tmp_path, evaluation={"suites": {"names": [*names]}})))

    check("perplexity")
    with pytest.raises(RecipeError, match="own run in lm-evaluation-harness, which is not installed"):
        check("perplexity", "own")


def test_a_run_folder_that_is_removed_while_training_is_a_run_again_with_the_next_checkpoint(
    tmp_path: Path, tiny_data: Path, nursery: Nursery
) -> None:
    run = tmp_path / "run"
    recipe = write_recipe(tmp_path / "r.yaml", recipe_values(tiny_data, run, checkpoint={"every": 4, "keep": 9}))
    codes, printed, _ = run_with(nursery, recipe, ranks=1, gone_after=5)
    assert codes == [0], printed
    assert finished_checkpoints(run) == [8, 12] and (run / "weights").is_dir() and (run / "tokenizer").is_dir()
    assert sorted(losses(run)) == [9, 10, 11, 12], "records follow the folder from its first checkpoint on"
    assert not unfinished(prepare(build_recipe(recipe_values(tiny_data, run)), ALONE).recipe)


def test_a_run_folder_has_the_name_that_it_was_given(tmp_path: Path, tiny_data: Path, one_rank: Workers) -> None:
    name = "größe ✓: run #2"
    recipe = write_recipe(tmp_path / "r.yaml", recipe_values(tiny_data, tmp_path / "run", budget={"steps": 6}))
    (tmp_path / name).mkdir()
    (tmp_path / name / "stop").touch()
    code, printed = one_rank.run("--config", str(recipe), "--run-dir", str(tmp_path / name))
    assert code == 76, printed
    assert (tmp_path / name / "recipe.yaml").is_file() and finished_checkpoints(tmp_path / name) == [1]


def test_a_home_folder_is_one_and_a_name_fits_into_a_file_system(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    recipe = build_recipe(recipe_values(Path("data"), Path("~/runs/a")))
    assert recipe.run_folder == "/home/somebody/runs/a"
    with pytest.raises(RunError, match=r"cannot be a run folder .*too long.*; choose another name or run_dir"):
        prepare(build_recipe(recipe_values(tiny_data, tmp_path / ("x" * 300))), ALONE)


def test_a_request_made_after_the_last_look_stays(tmp_path: Path) -> None:
    """Somebody who wants the run to stop touches the file while the checkpoint that he asked for is being written."""
    stop = StopRequest(tmp_path, environ={})
    (tmp_path / "checkpoint").touch()
    assert stop.poll() is Request.CHECKPOINT
    (tmp_path / "stop").touch()
    stop.acknowledge()
    assert [entry.name for entry in tmp_path.iterdir()] == ["stop"] and stop.poll() is Request.HOLD


def test_a_request_that_cannot_be_removed_is_heeded_once(tmp_path: Path) -> None:
    stop = StopRequest(tmp_path, environ={})
    (tmp_path / "checkpoint").mkdir()
    assert stop.poll() is Request.CHECKPOINT
    stop.acknowledge()
    assert stop.poll() is Request.NONE


def test_a_file_system_that_hiccups_asks_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopRequest(tmp_path, environ={})

    def stale(*_: Any, **__: Any) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "stat", stale)
    assert stop.poll() is Request.NONE


def test_a_checkpoint_may_take_longer_than_a_step_may_stand_still() -> None:
    beats: list[tuple[str, float]] = []
    trainer = SimpleNamespace(
        store=SimpleNamespace(writing=False, begin=lambda state: None, finish=lambda: None, seconds=1.0),
        watchdog=SimpleNamespace(beat=lambda doing, allow: beats.append((doing, allow))),
        patience=1800.0,
        stop=SimpleNamespace(reserve=0.0),
        telemetry=SimpleNamespace(sync=lambda: None),
    )
    trainer._finish_checkpoint = lambda state: Trainer._finish_checkpoint(trainer, state)  # type: ignore[arg-type]
    Trainer._checkpoint(trainer, TrainState(step=4), wait=True)  # type: ignore[arg-type]
    assert beats == [("checkpoint after step 4", 1800.0), ("checkpoint by step 4", 1800.0)]


def test_a_branch_whose_records_are_half_copied_gets_them_all(
    tmp_path: Path, tiny_data: Path, one_rank: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = one_rank.train(tmp_path, recipe_values(tiny_data, tmp_path / "run", checkpoint={"every": 4, "keep": 9}))
    trunk, branch = RunFolder(run), RunFolder(run / "branches" / "8")
    branch.path.mkdir(parents=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        seed_branch(trunk, branch, 8)
    seed_branch(trunk, branch, 8)
    assert branch.metrics_file.read_bytes() == trunk.metrics_file.read_bytes()
    assert finished_checkpoints(branch.path) == [8]


def test_other_code_versions_or_devices_since_the_last_start_are_told(
    tmp_path: Path, tiny_data: Path, one_rank: Workers
) -> None:
    values = recipe_values(tiny_data, tmp_path / "run", checkpoint={"every": 0})
    recipe = write_recipe(tmp_path / "r.yaml", values)
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    (run.path / "stop").touch()
    assert one_rank.run("--config", str(recipe))[0] == 76
    prepared = prepare(build_recipe(values), ALONE)
    assert changes_since_last_start(run, prepared, ALONE, torch.device("cpu")) == []
    facts = describe_environment(prepared, ALONE, torch.device("cpu"))
    old = {**facts, "code": "0" * 16, "commit": "abc", "versions": {**facts["versions"], "torch": "2.6.0"}}
    run.write_json(run.environment_file, old)
    (run.path / "stop").touch()
    code, printed = one_rank.run("--config", str(recipe))
    assert code == 76 and "torch was 2.6.0 and is " in printed and "the code was that of commit abc" in printed, printed
    assert any("torch was 2.6.0" in e["text"] for e in metrics(run.path, "event") if e["event"] == "warning")


def test_a_dry_run_says_what_a_run_goes_on_from_and_a_damaged_status_does_not_keep_it(
    tmp_path: Path, tiny_data: Path, one_rank: Workers
) -> None:
    values = recipe_values(tiny_data, tmp_path / "run", checkpoint={"every": 0}, budget={"steps": 6})
    recipe = write_recipe(tmp_path / "r.yaml", values)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()
    assert one_rank.run("--config", str(recipe))[0] == 76
    code, printed = one_rank.run("--config", str(recipe), "--dry-run")
    assert code == 0 and "goes on from     step-00000001" in printed, printed
    code, printed = one_rank.run("--config", str(recipe), "--dry-run", "deepspeed.config=zero1")
    assert code == 0 and "goes on from     nothing: " in printed and "zero_stage 3" in printed, printed
    (tmp_path / "run" / "checkpoints" / "step-00000002").mkdir()
    (tmp_path / "run" / "checkpoints" / "step-00000002" / "checkpoint.json").write_text("{}", encoding="utf-8")
    code, printed = one_rank.run("--config", str(recipe), "--dry-run")
    assert code == 0 and "passes over      step-00000002: " in printed, printed
    assert "goes on from     step-00000001" in printed, printed
    (tmp_path / "run" / "status.json").write_bytes(b"")
    code, printed = one_rank.run("--config", str(recipe))
    assert code == 0 and "resuming at step 1" in printed, printed


def test_records_go_on_where_the_file_can_be_found(tmp_path: Path) -> None:
    """After a stale handle of a network file system, after the file was removed, and after a way back meanwhile."""
    recipe = build_recipe(recipe_values(Path("data"), tmp_path))
    run = RunFolder(tmp_path)
    telemetry = Telemetry(run, recipe, 12, active=True)

    def steps() -> list[int]:
        return [record["step"] for record in metrics(tmp_path, "train")]

    def break_off(data: bytes) -> int:
        raise OSError(errno.ESTALE, "Stale file handle")

    telemetry.record("train", {"step": 1})
    stale = SimpleNamespace(write=break_off, close=lambda: None)
    sound, telemetry._stream = telemetry._stream, stale  # type: ignore[assignment]
    telemetry.record("train", {"step": 2})
    sound.close()
    telemetry.record("train", {"step": 3})
    assert steps() == [1, 2, 3]
    telemetry._stream.close()
    telemetry._stream = stale  # type: ignore[assignment]
    for step in (4, 5, 6):
        telemetry.record("train", {"step": step})
    telemetry.rewind(4)
    telemetry.record("train", {"step": 5})
    assert steps() == [1, 2, 3, 4, 5]
    run.metrics_file.unlink()
    telemetry.sync()
    telemetry.record("train", {"step": 6})
    telemetry.close()
    assert steps() == [6]


def test_runs_are_listed_behind_links_and_beside_folders_that_hold_anything(tmp_path: Path) -> None:
    make_run(tmp_path / "scratch" / "linked", "finished")
    runs = tmp_path / "runs"
    make_run(runs / "sound", "finished")
    make_run(runs / "sound" / "branches" / "8", "finished")
    (runs / "linked").symlink_to(tmp_path / "scratch" / "linked")
    (runs / "circle").symlink_to(runs)
    contents = {
        "status": b"[]",
        "stateless": b"{}",
        "plan": b'{"stops": 3}',
        "bytes": b"\xff\xfe\n",
        "null": b"null\n",
    }
    for name, content in contents.items():
        run = make_run(runs / name, "finished")
        file = {"plan": run.plan_file, "bytes": run.metrics_file, "null": run.metrics_file}.get(name, run.status_file)
        file.write_bytes(content)
    rows = {row[0]: row[1] for row in (describe(run, str(run.path.relative_to(runs))) for run in find_runs(runs))}
    assert {name for name, state in rows.items() if state == "finished"} == {"sound", "sound/branches/8", "linked"}
    assert {name for name, state in rows.items() if state.startswith("damaged")} == set(contents)


def test_a_loss_that_is_no_number_is_no_spike(tmp_path: Path, tiny_data: Path, nursery: Nursery) -> None:
    """Its update is left out, and the run does not go back for it."""
    faults = {"spike": 2.0, "spike_window": 3, "on_spike": "rollback"}
    values = recipe_values(tiny_data, tmp_path / "run", faults=faults, checkpoint={"every": 3, "keep": 9})
    codes, printed = run_faulty(nursery, {"rank": 1, "nan_samples": [56]}, write_recipe(tmp_path / "r.yaml", values))
    assert codes == [0, 0], printed
    events = [(e["event"], e["step"]) for e in metrics(tmp_path / "run", "event")]
    assert events == [("started", 0), ("non_finite", 8), ("finished", 12)]


def test_lines_that_a_power_cut_left_are_named_and_dropped_by_the_next_start(tmp_path: Path) -> None:
    run = make_run(tmp_path, "running")
    sound = list(run.metrics())
    for rubbish in (b"\xff\xfe\n", b"null\n", bytes(40) + b"\n"):
        with run.metrics_file.open("ab") as stream:
            stream.write(rubbish + b'{"kind":"train","step":2,"lo')
        with pytest.raises(RunError, match=rf"metrics.jsonl:{len(sound) + 1}: not a JSON object"):
            list(run.metrics())
        rewind_metrics(run, 3)
        assert list(run.metrics()) == sound


def test_a_log_that_takes_no_line_costs_nothing(tmp_path: Path, tiny_data: Path) -> None:
    """Neither the run nor its exit code, which Python would make 120."""
    values = recipe_values(tiny_data, tmp_path / "run", budget={"steps": 6}, checkpoint={"every": 0})
    recipe = write_recipe(tmp_path / "r.yaml", values)
    command = [sys.executable, str(ROOT / "pretrain" / "train.py"), "--config", str(recipe)]
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run(command, env=environment(), stdout=full, stderr=full, timeout=240)
        assert done.returncode == 0 and sorted(losses(tmp_path / "run")) == list(range(1, 7))
        printed = subprocess.run([*command, "--print"], env=environment(), stdout=full, stderr=full, timeout=240)
        assert printed.returncode != 0, "there the lines are all that was asked for"


@pytest.mark.parametrize(("handler", "asked"), [(signal.SIG_DFL, Request.STOP), (signal.SIG_IGN, Request.NONE)])
def test_a_terminal_that_is_closed_asks_to_stop_unless_nobody_minds(handler: Any, asked: Request) -> None:
    before = signal.signal(signal.SIGHUP, handler)
    try:
        with StopRequest(environ={}) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.poll() is asked
        assert signal.getsignal(signal.SIGHUP) is handler
    finally:
        signal.signal(signal.SIGHUP, before)


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


def test_a_checkpoint_that_cannot_be_read_for_a_moment_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fake_checkpoint(tmp_path, 4)
    troubles: list[int] = []

    def flaky(read: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(file: Path, *arguments: Any, **options: Any) -> Any:
            if file.parent == folder and troubles:
                raise OSError(code := troubles.pop(), os.strerror(code), str(file))
            return read(file, *arguments, **options)

        return attempt

    monkeypatch.setattr(checkpoint, "_READ_AGAIN_SECONDS", (0.0, 0.0))
    for place, name, file in ((Path, "open", "checkpoint.json"), (checkpoint, "sha256_file", "a.pt")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, flaky(getattr(place, name)))
            troubles[:] = [errno.ESTALE, errno.EIO]
            assert checkpoint.find_damage(folder) is None and not troubles
            troubles[:] = [errno.EIO] * 3
            assert f"{file} cannot be read" in str(checkpoint.find_damage(folder))


# Pools of libraries fork, and end their processes with SIGTERM.
FORKING = """
import os, signal
from pretrain.signals import Request, StopRequest
with StopRequest(debounce=0.0, environ={}) as stop:
    for _ in range(3):
        child = os.fork()
        if child == 0:
            signal.pause()
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert stop.poll() is Request.NONE
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.poll() is Request.STOP
print("done")
"""


def test_forked_processes_die_of_their_signals_and_do_not_pass_them_on() -> None:
    done = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr


def test_what_a_kill_left_half_removed_is_in_nobodys_way(tmp_path: Path, tiny_data: Path, one_rank: Workers) -> None:
    """Neither of a rotation nor of the way back to a larger budget."""
    values = recipe_values(tiny_data, tmp_path / "run", budget={"steps": 6}, checkpoint={"every": 1, "keep": 1})
    values["schedule"] = {"kind": "wsd", "warmup": 1, "decay": 2}
    recipe, run = write_recipe(tmp_path / "r.yaml", values), tmp_path / "run"
    run.mkdir()
    (run / "stop").touch()
    assert one_rank.run("--config", str(recipe))[0] == 76
    for half in (run / "checkpoints" / ".step-00000002.removing", run / ".weights.removing"):
        half.mkdir()
        (half / "rest").touch()
    code, printed = one_rank.run("--config", str(recipe))
    assert code == 0 and "No checkpoint" not in printed, printed
    code, printed = one_rank.run("--config", str(recipe), "budget.steps=8")
    assert code == 0 and "going on from step 4" in printed, printed
    assert finished_checkpoints(run) == [6, 8]
