"""`mor jobs`: what Slurm and run folders say about jobs, also when files are damaged."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pretrain.cli.jobs import app
from pretrain.cluster.job_records import Record, remember, remembered
from pretrain.cluster.jobs import JobView, view_jobs
from pretrain.recipe.recipe import Recipe, build_recipe
from pretrain.records.finished import parts
from tests.pretrain.support import recipe_values, tiny_model, write_recipe

BRANCHES = {"budget": {"steps": 160, "branches": [150]}, "schedule": {"kind": "wsd", "warmup": 2, "decay": 0.2}}


@pytest.fixture
def run(tmp_path, monkeypatch) -> Recipe:
    """A recipe of 160 steps with a branch of 150, which leaves the trunk after 120; nothing is trained yet."""
    monkeypatch.setenv("MOR_JOBS", str(tmp_path / "jobs.jsonl"))
    monkeypatch.setenv("PATH", str(tmp_path))
    values = recipe_values(tmp_path / "data", tmp_path / "run", **BRANCHES, model=tiny_model("vanilla"))
    write_recipe(tmp_path / "recipe.yaml", values)
    return build_recipe(values)


@pytest.fixture
def squeue(tmp_path):
    """Makes `squeue` answer these lines."""

    def answer(*lines: str) -> None:
        (tmp_path / "squeue").write_text("#!/bin/sh\n" + "".join(f'echo "{line}"\n' for line in lines))
        (tmp_path / "squeue").chmod(0o755)

    return answer


def log(run: Recipe, part: int, state: str, step: int, *records: dict[str, Any]) -> None:
    """Files of the trunk (0) or a branch as training leaves them."""
    trained = parts(run)[part]
    folder = trained.folder
    folder.write_text(folder.recipe_file, trained.recipe.to_yaml())
    folder.write_json(folder.status_file, {"state": state, "step": step, "steps": trained.steps})
    lines = [{"kind": "train", **record} for record in records] + [{"kind": "event", "event": "x"}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    folder.metrics_file.write_text(text + '{"kind": "train", "st', encoding="utf-8")


def record(run: Recipe, **changes: Any) -> Record:
    file = str(Path(run.run_folder).parent / "recipe.yaml")
    values = {"job": "41", "name": "tiny", "kind": "train", "run": run.run_folder, "log": "log", "time": 0.0}
    return Record(**{**values, "recipe": file, "overrides": [], **changes})


def seen(view: JobView) -> tuple[Any, ...]:
    return view.state, view.branch, view.step, view.steps, view.loss, view.remaining


def test_a_job_is_followed_through_its_trunk_and_its_branch(run, squeue):
    def view() -> tuple[Any, ...]:
        return seen(view_jobs([record(run)])[0])

    squeue("41|RUNNING|None")
    assert view() == ("RUNNING", None, 0, 160, None, None)
    log(run, 0, "running", 0, {"step": 40, "lm_loss": 2.5, "step_seconds": 3.0})
    # The branch has its first 120 steps from the trunk.
    assert view() == ("RUNNING", None, 40, 160, 2.5, (120 + 30) * 3.0)
    log(run, 0, "finished", 160, {"step": 160, "lm_loss": 1.5, "step_seconds": 3.0})
    assert view() == ("RUNNING", "150", 120, 150, None, 30 * 3.0)
    log(run, 1, "running", 120, {"step": 131, "lm_loss": 2.0, "step_seconds": 2.0})
    assert view() == ("RUNNING", "150", 131, 150, 2.0, 19 * 2.0)
    squeue()
    assert view()[0] == "GONE"
    log(run, 1, "stopped", 131, {"step": 131, "lm_loss": 2.0})
    assert view()[0] == "ENDED", "the trunk alone is not the run"
    log(run, 1, "finished", 150, {"step": 150, "lm_loss": 1.9})
    assert view() == ("COMPLETED", None, 160, 160, 1.5, None)
    raised, other = (["budget.steps=200", "budget.branches=[150]"], ["seed=99", "budget.steps=9000"])
    longer, changed = view_jobs([record(run, overrides=raised), record(run, overrides=other)])
    assert (longer.state, longer.step, longer.steps) == ("ENDED", 160, 200), "this budget was never trained"
    assert seen(changed) == view(), "the recipe file describes another run by now"


def test_without_its_recipe_file_a_job_trains_what_its_run_was_begun_with(run, squeue):
    squeue("41|PENDING|Dependency", "not a line of squeue's", "42|RUNNING|None")
    log(run, 0, "stopped", 40, {"step": 40, "lm_loss": None, "step_seconds": 0})
    waiting, evaluation = view_jobs([record(run, recipe="/gone.yaml"), record(run, job="42", kind="eval")])
    assert waiting.loss is not None and math.isnan(waiting.loss), "null is what a loss that is not finite is logged as"
    assert seen(replace(waiting, loss=None)) == ("PENDING", None, 40, 160, None, None)
    assert waiting.reason == "Dependency"
    assert seen(evaluation) == ("RUNNING", None, None, None, None, None)


@pytest.mark.parametrize("status", ["[]", '{"state": 3}', '{"state": "running", "step": "x"}', "\xff"])
def test_a_damaged_status_is_said_and_hides_no_other_job(run, status):
    log(run, 0, "running", 40)
    parts(run)[0].folder.status_file.write_text(status)
    damaged, other = view_jobs([record(run), record(run, kind="eval")])
    assert damaged.state == "ENDED" and "status.json" in damaged.reason
    assert other.state == "ENDED" and not other.reason


@pytest.mark.parametrize(
    "value", ["[1]", '{"kind": "train", "step": [], "lm_loss": "x", "step_seconds": {}}', "[" * 5000]
)
def test_metrics_of_another_kind_are_not_shown(run, value):
    log(run, 0, "running", 40)
    parts(run)[0].folder.metrics_file.write_text(value + "\n")
    (view,) = view_jobs([record(run)])
    assert (view.step, view.loss) in ((40, None), (0, None))


def test_records_are_read_around_what_is_damaged(run, tmp_path):
    first, second = record(run), record(run, job="42")
    remember(first)
    with (tmp_path / "jobs.jsonl").open("ab") as stream:
        stream.write(b'{"job": "half a li')  # the disk was full
    remember(second)
    with (tmp_path / "jobs.jsonl").open("ab") as stream:
        stream.write(json.dumps({**vars(first), "time": "now"}).encode() + b"\n\xff\n[]\n" + b"[" * 9999 + b"\n")
    said: list[str] = []
    assert remembered(said.append) == [first, second]
    assert said == [f"{tmp_path / 'jobs.jsonl'}: line 2 (and 4 more) is damaged and left out; remove it."]


def test_what_is_shown_is_neither_markup_nor_an_escape(run, monkeypatch):
    for name in ("[/red]x", "\x1b[31mred"):
        remember(record(run, kind="eval", name=name))
    shown = CliRunner().invoke(app, ["--all"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert "[/red]x" in shown.output and "\\x1b[31mred" in shown.output and "\x1b" not in shown.output
