"""Stopping in the middle of an evaluation: soon, on all ranks alike, and without changing the result of the run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoints.store import find_damage
from tests.pretrain.checkpoints.test_resume import assert_same_run, finished_checkpoints
from tests.pretrain.support import Job, Nursery, Workers, losses, metrics, recipe_values, train, write_recipe
from tests.pretrain.training.test_evaluate_in_training import values_of

SCRIPT = Path(__file__).resolve().parents[1] / "faulty_evaluation.py"


def run_with(nursery: Nursery, recipe: Path, ranks: int = 2, **fault: Any) -> tuple[list[int], str, list[int]]:
    """Train with `faulty_evaluation.py`; exit codes, what was printed, and forward passes of evaluations by rank."""
    job = Job(recipe, ranks=ranks, extra={"FAULT": json.dumps(fault)}, script=SCRIPT, nursery=nursery)
    codes, output, errors = job.wait()
    return codes, output + errors, [int(count) for count in re.findall(r"rank \d made (\d+) passes", output)]


def evaluations(run: Path) -> list[tuple[Any, ...]]:
    """What evaluations came to, without how long they took."""
    return [(r["step"], r["suite"], r["n"], r["metrics"]) for r in metrics(run, "evaluation")]


@pytest.mark.parametrize(
    "stage", ["zero3", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("zero0", "zero1", "zero2"))]
)
def test_a_signal_to_one_rank_breaks_an_evaluation_off_and_the_next_start_makes_it_good(
    tmp_path: Path, prose_data: Path, nursery: Nursery, stage: str
) -> None:
    """During validation, during a suite of the harness, and during the last evaluation of all, one after the other."""
    suites = {"names": ["perplexity", "own"], "every": 4, "limit": 5}
    values = values_of(prose_data, tmp_path / "whole", every=4, sequences=12, suites=suites)
    values |= {"deepspeed": {"config": stage}, "checkpoint": {"every": 4, "keep": 9, "keep_best": True}}
    whole, run = tmp_path / "whole", tmp_path / "run"
    codes, printed, passes = run_with(nursery, write_recipe(tmp_path / "whole.yaml", values))
    assert codes == [0, 0], printed
    each = passes[0] // 2  # validation and suites of one step
    recipe = write_recipe(tmp_path / "r.yaml", {**values, "run_dir": str(run)})

    def stopped(number: int, rank: int) -> list[str]:
        codes, printed, passes = run_with(nursery, recipe, signal_pass={str(rank): number})
        assert codes == [75, 75], printed
        assert passes == [number, number], "no rank begins another pass"
        state = json.loads((run / "status.json").read_text(encoding="utf-8"))
        newest = run / "checkpoints" / f"step-{state['step']:08d}"
        assert state["state"] == "stopped" and find_damage(newest) is None
        return json.loads((newest / "checkpoint.json").read_text(encoding="utf-8"))["state"]["unfinished"]

    assert stopped(number=2, rank=1) == ["validation", "suites"]
    assert not metrics(run, "validation") and not metrics(run, "evaluation")
    assert stopped(number=each - 1, rank=0) == ["validation", "suites"], "the checkpoint that is there says so"
    assert {r["step"] for r in metrics(run, "validation")} == {4} and not metrics(run, "evaluation")
    assert not (run / "evaluation").exists(), "no result of the suite that was done by then passes for a whole one"
    assert stopped(number=2 * each - 1, rank=1) == ["suites"], "those of the last step of all"
    assert not (run / "weights").exists()
    train(recipe, ranks=2, nursery=nursery)
    assert_same_run(run, whole)
    assert evaluations(run) == evaluations(whole)
    assert finished_checkpoints(run) == finished_checkpoints(whole)


@pytest.mark.parametrize("asynchronous", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_checkpoints_are_no_more_minutes_apart_than_the_recipe_says(
    tmp_path: Path, tiny_data: Path, two_ranks: Workers, nursery: Nursery, asynchronous: bool
) -> None:
    """By rank 0's clock alone, measured from the end of the last checkpoint of any kind."""
    checkpoint = {"every": 5, "every_minutes": 20, "keep": 9, "asynchronous": asynchronous}
    values = recipe_values(tiny_data, tmp_path / "run", checkpoint=checkpoint)
    codes, printed, _ = run_with(
        nursery, write_recipe(tmp_path / "r.yaml", values), step_minutes={"0": 7.0, "1": 100.0}
    )
    assert codes == [0, 0], printed
    # Three steps are 21 minutes; 5 and 10 are due anyway, and 8 is where the fall of the learning rate begins.
    assert finished_checkpoints(tmp_path / "run") == [3, 5, 8, 10, 12]
    plain = {**values, "run_dir": str(tmp_path / "plain"), "checkpoint": {"every": 0}}
    assert losses(tmp_path / "run") == losses(two_ranks.train(tmp_path, plain)), "writing them changes nothing"


@pytest.mark.slow
def test_a_signal_after_the_last_step_ends_a_run_before_its_branches(
    tmp_path: Path, tiny_data: Path, nursery: Nursery
) -> None:
    run = tmp_path / "run"
    values = recipe_values(tiny_data, run, budget={"steps": 12, "branches": [8]}, checkpoint={"every": 0})
    recipe = write_recipe(tmp_path / "r.yaml", values)
    codes, printed, _ = run_with(nursery, recipe, signal_export=1)
    assert codes == [75, 75], printed
    assert (run / "weights").is_dir() and not (run / "branches").exists()
    train(recipe, ranks=2, nursery=nursery)
    assert (run / "branches" / "8" / "weights").is_dir()
