"""`mor runs` and `--print`, `--dry-run`: what a person reads without training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from data_prep.terminal import duration
from pretrain.cli.main import main
from pretrain.cli.runs import app, describe, find_runs
from pretrain.recipe.recipe import build_recipe
from pretrain.records.run_folder import RunFolder
from pretrain.records.telemetry import Telemetry, rewind_metrics
from pretrain.training.dry_run import describe as describe_plan
from pretrain.training.prepare import prepare
from tests.pretrain.support import ALONE, Workers, recipe_values, write_recipe


def make_run(folder: Path, state: str) -> RunFolder:
    run = RunFolder(folder)
    recipe = build_recipe(recipe_values(Path("data"), folder))
    run.write_text(run.recipe_file, recipe.to_yaml())
    run.write_json(run.plan_file, {"steps": 12})
    run.write_json(run.status_file, {"state": state, "step": 3, "steps": 12})
    telemetry = Telemetry(run, recipe, 12, active=True)
    for step in (1, 2, 3):
        record = {"step": step, "lm_loss": 5.0 - step, "tokens_per_second": 1000.0, "step_seconds": 10.0}
        telemetry.record("train", record)
    telemetry.record("validation", {"step": 3, "source": "a", "loss_causal": 2.5})
    telemetry.close()
    return run


def test_runs_are_listed_with_state_progress_and_losses(tmp_path: Path) -> None:
    make_run(tmp_path / "one", "running")
    make_run(tmp_path / "group" / "two", "finished")
    (tmp_path / "not-a-run").mkdir()
    rows = [describe(run, run.name) for run in find_runs(tmp_path)]
    assert rows == [
        ["two", "finished", "3/12", "2.0000", "2.5000", "1,000", "-"],
        ["one", "running", "3/12", "2.0000", "2.5000", "1,000", "2 min"],
    ]
    printed = CliRunner().invoke(app, [str(tmp_path)], env={"COLUMNS": "160"})
    assert printed.exit_code == 0 and "group/two" in printed.output and "finished" in printed.output
    empty = CliRunner().invoke(app, [str(tmp_path / "not-a-run")])
    assert "holds no run folders" in empty.output


def test_a_damaged_run_and_a_loss_that_is_not_finite_leave_the_table_whole(tmp_path: Path) -> None:
    make_run(tmp_path / "one", "running")
    make_run(tmp_path / "torn", "running").status_file.write_text("{", encoding="utf-8")
    for state, step in (("failed", 4), ("finished", 12)):
        run = make_run(tmp_path / state, state)
        diverged = Telemetry(run, build_recipe(recipe_values(Path("data"), run.path)), 12, active=True)
        diverged.record("train", {"step": step, "lm_loss": math.nan, "tokens_per_second": 1.0, "step_seconds": 1.0})
        diverged.record("validation", {"step": step, "loss_causal": math.inf})
        diverged.close()
    failed = RunFolder(tmp_path / "failed").status_file
    failed.write_text(json.dumps({"state": "failed", "step": 3, "steps": 12, "reason": "5 steps " + "on " * 50}))
    rows = {row[0]: row[1:] for row in (describe(run, run.name) for run in find_runs(tmp_path))}
    assert rows["failed"][0].startswith("failed: 5 steps on on") and rows["failed"][0].endswith(" ...")
    assert rows["failed"][1:] == ["4/12", "not finite", "not finite", "1", "-"]
    assert rows["finished"][:3] == ["finished, its loss is not finite", "12/12", "not finite"]
    assert rows["one"][0] == "running" and "torn/status.json: cannot be read" in rows["torn"][0]


def test_names_and_reasons_are_shown_as_they_are(tmp_path: Path) -> None:
    """Folders with names that rich would read as markup, that a terminal would obey, or that are no UTF-8."""
    for name in ("[/red]", "[bold]x", "\x1b[31mred", "\udcff"):
        run = make_run(tmp_path / "made", "failed")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        run = RunFolder(run.path.rename(tmp_path / name))
        run.write_json(run.status_file, {"state": "failed", "step": 3, "reason": "[/path]: \x1b[2J"})
    printed = CliRunner().invoke(app, [str(tmp_path)], env={"COLUMNS": "300"})
    assert printed.exit_code == 0, printed.output
    assert printed.output.count("[/path]") == 4 and "\x1b" not in printed.output
    for shown in ("[/red]", "[bold]x", r"\x1b[31mred", r"\udcff"):
        assert shown in printed.output


def test_an_error_is_printed_without_what_a_terminal_obeys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["mor", "flops", str(tmp_path / "\x1b[2J\udcff.yaml")])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "\x1b" not in said and r"\x1b[2J\udcff.yaml" in said


def test_records_after_the_resumed_step_and_half_lines_are_dropped(tmp_path: Path) -> None:
    run = make_run(tmp_path, "running")
    with run.metrics_file.open("ab") as stream:
        stream.write(b'{"kind":"event","event":"x","step":3}\n{"kind":"train","ste')
    rewind_metrics(run, 2)
    assert [(r["kind"], r["step"]) for r in run.metrics()] == [("train", 1), ("train", 2), ("event", 3)]
    assert run.metrics_file.read_bytes().endswith(b"}\n")


def test_print_and_a_dry_run_check_everything_and_train_nothing(
    tmp_path: Path, tiny_data: Path, one_rank: Workers
) -> None:
    values = recipe_values(tiny_data, tmp_path / "run")
    recipe = write_recipe(tmp_path / "r.yaml", values)
    code, printed = one_rank.run("--config", str(recipe), "--print", "optim.lr=0.5")
    shown = yaml.safe_load(printed)
    assert code == 0 and shown["optim"]["lr"] == 0.5 and shown["faults"]["max_non_finite"] == 5
    assert build_recipe(shown) == build_recipe(values, ["optim.lr=0.5"])
    code, printed = one_rank.run("--config", str(recipe), "--dry-run")
    assert code == 0, printed
    for part in ("steps            12", "training FLOPs", "0.25 epochs", "memory", "time", "2 x 4 x 1", '"stage": 3'):
        assert part in printed, printed
    assert not (tmp_path / "run").exists()
    code, printed = one_rank.run("--config", str(recipe), "--dry-run", "data.path=/nowhere")
    assert code == 2 and "/nowhere" in printed


def test_the_time_that_is_left_follows_from_what_the_run_has_reached(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(build_recipe(recipe_values(tiny_data, tmp_path / "run")), ALONE)
    run, flops = prepared.folder, prepared.plan.training_flops
    assert "not known before the first steps" in describe_plan(prepared, ALONE)
    run.path.mkdir()
    records = [
        {"kind": "train", "step": step, "flops_per_second": rate * flops} for step, rate in enumerate((9, 2, 4, 4))
    ]
    run.write_text(run.metrics_file, "".join(json.dumps(record) + "\n" for record in records))
    run.write_json(run.environment_file, {"world_size": 2})
    run.write_json(run.status_file, {"state": "stopped", "step": 3, "steps": 12})
    # Two ranks did the whole run's work four times a second, one does so twice; three quarters of it are left.
    assert f"{2 * flops:.3g} FLOP/s a rank, the speed reached so far on 2" in describe_plan(prepared, ALONE)
    run.write_text(run.metrics_file, json.dumps({**records[0], "flops_per_second": flops / 1000}) + "\n")
    assert f"time             about {duration(0.75 * 2000)} more" in describe_plan(prepared, ALONE)
    # A GPU is assumed to reach a share of its peak.
    run.metrics_file.unlink()
    monkeypatch.setattr("pretrain.training.dry_run.trains_on_cpu", lambda: False)
    monkeypatch.setattr("pretrain.training.dry_run.peak_flops", lambda device: 1e15 if device.type == "cuda" else None)
    assert "at 4e+14 FLOP/s a rank" in describe_plan(prepared, ALONE)
