"""A job that gets nowhere is not started for ever: training, evaluation, preparation and comparison."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.cluster.restarts import STARTS_WITHOUT_PROGRESS, note_start, trained, written
from pretrain.errors import LaunchError


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    return tmp_path / "run"


def start(run: Path, job: str = "1") -> str | None:
    return note_start(run.parent / ".restarts.json", "RUN", trained(run), job, pytest.fail)


def latest(run: Path, step: int) -> None:
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")


def test_a_crash_loop_is_recognised_by_its_steps(run):
    for _ in range(STARTS_WITHOUT_PROGRESS):
        assert start(run) is None
    assert "RUN: started 4 times without a checkpoint after step 0" in (start(run) or "")
    assert start(run, "2") is None, "a person's new submission starts counting anew"
    latest(run, 160)
    for step in range(120, 150, 5):
        latest(run / "branches" / "150", step)
        assert start(run, "2") is None, "a branch that goes on is progress"
    for _ in range(STARTS_WITHOUT_PROGRESS - 1):
        assert start(run, "2") is None
    assert "after step 160, or after step 145 of branch 150" in (start(run, "2") or "")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", '{"job": "1"}', '{"job": "1", "starts": {}}', '{"job": 1, "starts": []}', "[" * 9999,
     '{"job": "1", "starts": [{"reached": 3, "time": ""}]}', "\ud800"],
)  # fmt: skip
def test_a_damaged_history_is_said_and_begun_anew(run, content):
    file = run.parent / ".restarts.json"
    file.write_text(content, encoding="utf-8", errors="surrogatepass")
    said: list[str] = []
    assert note_start(file, "RUN", trained(run), "1", said.append) is None
    assert len(said) == 1 and str(file) in said[0] and "counted anew" in said[0]
    assert len(json.loads(file.read_text())["starts"]) == 1


def test_a_start_that_cannot_be_counted_is_refused(run):
    (run.parent / "file").touch()
    with pytest.raises(LaunchError, match="cannot be written down"):
        note_start(run.parent / "file" / ".restarts.json", "RUN", "", "1", print)


@pytest.mark.parametrize("damaged", ["", "step-", "\xff\xfe", "step-" + "9" * 5000])
def test_what_is_no_latest_checkpoint_is_step_0(run, damaged):
    (run / "checkpoints" / "latest").write_text(damaged, encoding="latin-1")
    assert trained(run) == "a checkpoint after step 0"


@pytest.mark.parametrize("file", ["evaluation/own.json", "branches/9/checkpoints/latest", "vanilla/evaluation/own.json",
                                  "vanilla/branches/9/evaluation/own.json", ".work/piece-0-1.json"])  # fmt: skip
def test_results_checkpoints_and_pieces_are_progress(tmp_path, file):
    before = written([tmp_path])
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text("not progress: a crash loop logs too")
    assert written([tmp_path]) == before
    (tmp_path / file).touch()
    assert written([tmp_path]) != before
