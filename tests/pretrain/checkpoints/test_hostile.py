"""What users and clusters do to a run: folders that go away, disks that hiccup, other code."""

from __future__ import annotations

import errno
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.checkpoints import store as checkpoint
from pretrain.checkpoints.branches import seed_branch
from pretrain.cli.runs import describe, find_runs
from pretrain.errors import RunError, UserError
from pretrain.recipe.recipe import build_recipe
from pretrain.records.finished import unfinished
from pretrain.records.provenance import changes_since_last_start, describe_environment
from pretrain.records.run_folder import RunFolder
from pretrain.records.telemetry import Telemetry, rewind_metrics
from pretrain.training.evaluate_in_training import check_suites_of
from pretrain.training.prepare import prepare
from tests.pretrain.checkpoints.test_resume import finished_checkpoints
from tests.pretrain.cli.test_runs import make_run
from tests.pretrain.payloads import fake_checkpoint
from tests.pretrain.support import (
    ALONE,
    ROOT,
    Nursery,
    Workers,
    environment,
    losses,
    metrics,
    recipe_values,
    write_recipe,
)
from tests.pretrain.training.test_evaluate_in_training import values_of
from tests.pretrain.training.test_stopping import run_with


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
    with pytest.raises(UserError, match="lm-eval is not installed, and few-shot suites need it"):
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
    facts = describe_environment(prepared.recipe, prepared.ds_config, ALONE, torch.device("cpu"))
    assert changes_since_last_start(run, facts) == []
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
