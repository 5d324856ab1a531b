"""Run folders from elsewhere, damaged or made up: read by `mor runs`, the report and the progress of a comparison."""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from data_prep.terminal import ProgressBars
from pretrain.cli.runs import describe
from pretrain.comparison.arms_progress import ArmsProgress
from pretrain.comparison.experiment import Trial
from pretrain.comparison.report.build import print_results, write_report
from pretrain.comparison.report.results import Results, read_results
from pretrain.comparison.run_records import read_run
from pretrain.records.run_folder import RunFolder
from tests.fuzz.support import counts, drive, mutate_file, mutate_values
from tests.pretrain.comparison.synthetic import experiment, write_run

FILES = ("metrics.jsonl", "status.json", "recipe.yaml", "plan.json", "environment.json")
SUITES = ("perplexity", "routing", "blimp", "mmlu")
_STATES = {"finished", "running", "failed", "stopped", "absent", "unreadable"}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("good") / "mor", "mor", budget=2e13)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[-12:]))
    return run


def mutation(run: Path, source: random.Random) -> tuple[str, bytes]:
    """One file of the run, changed: its name and content."""
    name = source.choice([*FILES, "metrics.jsonl", *(f"evaluation/{suite}.json" for suite in SUITES)])
    content = (run / name).read_bytes()
    if name == "recipe.yaml" or source.random() < 0.5:
        return name, mutate_file(content.decode(), source)
    if name == "metrics.jsonl":
        records = [json.loads(line) for line in content.splitlines()]
        place = source.randrange(len(records))
        records[place] = mutate_values(records[place], source)
        return name, "".join(json.dumps(record) + "\n" for record in records).encode()
    return name, json.dumps(mutate_values(json.loads(content), source)).encode()


@counts
def test_one_run_folder_never_hides_the_others(good: Path, tmp_path: Path, count: int) -> None:
    """Each reader says what is wrong with the folder, as a row or a problem, and raises nothing."""
    run = Path(shutil.copytree(good, tmp_path / "mor"))
    trial = Trial("mor", 1, None, run)
    planned: Any = SimpleNamespace(trial=trial, plan=SimpleNamespace(steps=10), new_flops=1.0)

    def use(mutated: tuple[str, bytes]) -> tuple[list[str], Any]:
        name, content = mutated
        (run / name).write_bytes(content)
        try:
            row = describe(RunFolder(run), "mor")
            record = read_run(trial, "mor", ("perplexity",))
            with ProgressBars() as bars:
                ArmsProgress([planned], bars).follow(planned)
            return row, record
        finally:
            shutil.copyfile(good / name, run / name)

    def changed(mutated: tuple[str, bytes], result: tuple[list[str], Any]) -> str | None:
        row, record = result
        if len(row) != 7 or not all(isinstance(cell, str) for cell in row):
            return f"no row of seven texts: {row}"
        if record.state == "unreadable" and not record.problem:
            return "unreadable without a reason"
        if record.problem is not None and ("Traceback" in record.problem or len(record.problem) > 2000):
            return f"no sentence: {record.problem}"
        return None

    drive(count, lambda source: mutation(run, source), use, changed=changed, used=1)


@pytest.mark.parametrize("count", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_a_report_of_odd_runs_is_whole(good: Path, tmp_path: Path, count: int) -> None:
    """Page, Markdown, spreadsheet and terminal of three arms, of which two are odd."""
    for arm in ("vanilla", "mor", "other"):
        shutil.copytree(good, tmp_path / arm)
    made = experiment(tmp_path, arms={"vanilla": {}, "mor": {}, "other": {}})

    def make(source: random.Random) -> list[tuple[str, str, bytes]]:
        return [(arm, *readable(good, tmp_path / arm, source)) for arm in ("mor", "other")]

    def use(mutated: list[tuple[str, str, bytes]]) -> tuple[Results, list[str]]:
        before = {tmp_path / arm / name: (tmp_path / arm / name).read_bytes() for arm, name, _ in mutated}
        for arm, name, content in mutated:
            (tmp_path / arm / name).write_bytes(content)
        try:
            results = read_results(made)
            index = write_report(results, "odd.yaml")
            stream = io.StringIO()
            print_results(results, Console(file=stream, width=200))
            files = [index.with_name(name).read_text(encoding="utf-8") for name in ("index.html", "report.md")]
            return results, [*files, stream.getvalue()]
        finally:
            for file, content in before.items():
                file.write_bytes(content)

    def changed(mutated: Any, result: tuple[Results, list[str]]) -> str | None:
        results, texts = result
        odd = [record for record in results.records if record.state not in _STATES and not record.problem]
        if odd:
            return f"state {odd[0].state!r} without a problem"
        hostile = [sign for text in texts for sign in ("\x1b", "\x00", "\u202e") if sign in text]
        return f"{hostile} is shown" if hostile else None

    drive(count, make, use, changed=changed, used=1)


def readable(good: Path, run: Path, source: random.Random) -> tuple[str, bytes]:
    """A mutation that leaves the run readable: what is read is then drawn."""
    while True:
        name, content = mutation(good, source)
        before = (run / name).read_bytes()
        (run / name).write_bytes(content)
        record = read_run(Trial(run.name, 1, None, run), run.name)
        (run / name).write_bytes(before)
        if record.state != "unreadable" and content != (good / name).read_bytes():
            return name, content
