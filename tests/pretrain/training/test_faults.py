"""Steps, ranks and time limits that end a run or that it survives."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoints.store import find_damage
from pretrain.ranks.signals import EXIT_STALLED
from tests.pretrain.support import (
    Job,
    Nursery,
    Workers,
    losses,
    make_dataset,
    metrics,
    recipe_values,
    run_faulty,
    write_recipe,
)


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        ("zero3", "fp32"),
        *(
            pytest.param(*combination, marks=pytest.mark.slow)
            for combination in (
                ("zero1", "fp32"),
                ("zero0", "fp32"),
                ("zero1", "bf16"),
                ("zero2", "bf16"),
                ("zero3", "bf16"),
                ("zero3_offload_optimizer", "fp32"),
            )
        ),
    ],
)
def test_a_non_finite_step_is_left_out_on_all_ranks_alike(
    tmp_path: Path, tiny_data: Path, two_ranks: Workers, nursery: Nursery, stage: str, precision: str
) -> None:
    """NaN in one rank's loss at step 5: no update there, then as if that step had had no update everywhere."""
    how = {"deepspeed": {"config": stage}, "precision": precision, "schedule": {"kind": "constant"}}
    values = recipe_values(tiny_data, tmp_path / "run", **how)
    codes, printed = run_faulty(nursery, {"rank": 1, "nan_samples": [33]}, write_recipe(tmp_path / "r.yaml", values))
    assert codes == [0, 0], printed
    events = [e for e in metrics(tmp_path / "run", "event") if e["event"] == "non_finite"]
    assert [(e["step"], e["samples"], e["in_row"]) for e in events] == [(5, [32, 39], 1)]
    found = losses(tmp_path / "run")
    undisturbed = losses(two_ranks.train(tmp_path, {**values, "run_dir": str(tmp_path / "whole")}))
    assert [found[n] for n in range(1, 5)] == [undisturbed[n] for n in range(1, 5)]
    assert all(loss == loss for step, loss in found.items() if step != 5)
    # Without the samples, step 6 is step 5 and nothing else changes but the count.
    without = {**values, "run_dir": str(tmp_path / "without"), "budget": {"steps": 11}}
    without["data"] = {**values["data"], "skip_samples": [[32, 39]]}
    skipped = losses(two_ranks.train(tmp_path, without))
    assert [found[n + 1] for n in range(5, 12)] == pytest.approx([skipped[n] for n in range(5, 12)], abs=1e-6)


def test_too_many_non_finite_steps_in_a_row_end_the_run(tmp_path: Path, tiny_data: Path, nursery: Nursery) -> None:
    values = recipe_values(tiny_data, tmp_path / "run", faults={"max_non_finite": 3})
    fault = {"rank": 0, "nan_samples": list(range(16, 96))}
    codes, printed = run_faulty(nursery, fault, write_recipe(tmp_path / "r.yaml", values))
    assert codes == [2, 2] and "3 steps in a row" in printed and "samples 32 to 39" in printed
    status = json.loads((tmp_path / "run" / "status.json").read_text(encoding="utf-8"))
    assert status["state"] == "failed"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": {"steps": 5}}, "The loss that the run ends with is not finite, at step 5"),
        # The one update is so large that only what is measured afterwards tells.
        ({"budget": {"steps": 1}}, "The validation loss of the final weights is not finite (a)"),
        ({"budget": {"steps": 1}, "optim": {"lr": 1e39}}, "weights are not finite"),
    ],
)
def test_a_run_that_diverged_does_not_finish(
    tmp_path: Path, one_rank: Workers, changes: dict[str, Any], message: str
) -> None:
    """And starting it again does not finish it either."""
    data = make_dataset(tmp_path / "data", documents=50, validation="validation" in message)
    how = {"schedule": {"kind": "constant"}, "optim": {"lr": 1e20}, "checkpoint": {"every": 0}, **changes}
    recipe = write_recipe(tmp_path / "r.yaml", recipe_values(data, tmp_path / "run", **how))
    for _ in range(2):
        code, printed = one_rank.run("--config", str(recipe))
        assert code == 2 and message in printed, printed
        status = json.loads((tmp_path / "run" / "status.json").read_text(encoding="utf-8"))
        assert status["state"] == "failed" and message in status["reason"]
    assert not (tmp_path / "run" / "weights").exists()


@pytest.mark.parametrize("action", [pytest.param("skip", marks=pytest.mark.slow), "rollback"])
def test_a_loss_spike_is_skipped_or_rolled_back(tmp_path: Path, tiny_data: Path, nursery: Nursery, action: str) -> None:
    faults = {"spike": 2.0, "spike_window": 3, "on_spike": action}
    values = recipe_values(tiny_data, tmp_path / "run", faults=faults, checkpoint={"every": 3, "keep": 9})
    fault = {"rank": 0, "spike_samples": list(range(56, 64))}
    codes, printed = run_faulty(nursery, fault, write_recipe(tmp_path / "r.yaml", values))
    assert codes == [0, 0], printed
    events = metrics(tmp_path / "run", "event")
    assert [e["step"] for e in events if e["event"] == "spike"] == [8]
    assert sorted(losses(tmp_path / "run")) == list(range(1, 13))
    samples = metrics(tmp_path / "run", "train")[-1]["samples"]["data"]
    if action == "rollback":
        assert [(e["step"], e["samples"]) for e in events if e["event"] == "rollback"] == [(6, [48, 63])]
        assert samples == 12 * 8 + 16
    else:
        assert samples == 12 * 8


def test_a_loss_that_is_no_number_is_no_spike(tmp_path: Path, tiny_data: Path, nursery: Nursery) -> None:
    """Its update is left out, and the run does not go back for it."""
    faults = {"spike": 2.0, "spike_window": 3, "on_spike": "rollback"}
    values = recipe_values(tiny_data, tmp_path / "run", faults=faults, checkpoint={"every": 3, "keep": 9})
    codes, printed = run_faulty(nursery, {"rank": 1, "nan_samples": [56]}, write_recipe(tmp_path / "r.yaml", values))
    assert codes == [0, 0], printed
    events = [(e["event"], e["step"]) for e in metrics(tmp_path / "run", "event")]
    assert events == [("started", 0), ("non_finite", 8), ("finished", 12)]


@pytest.mark.slow
def test_a_spike_without_a_checkpoint_to_go_back_to_is_skipped(
    tmp_path: Path, tiny_data: Path, one_rank: Workers, nursery: Nursery
) -> None:
    """Two ranks that were converted from one rank's checkpoint have none of their own yet."""
    faults = {"spike": 2.0, "spike_window": 3, "on_spike": "rollback"}
    checkpoint = {"every": 0, "universal": True}
    values = recipe_values(tiny_data, tmp_path / "run", faults=faults, checkpoint=checkpoint)
    recipe = write_recipe(tmp_path / "r.yaml", {**values, "limits": {"wall_clock_hours": 0.001}})
    assert one_rank.run("--config", str(recipe))[0] == 75
    fault = {"rank": 0, "spike_samples": list(range(56, 64))}
    codes, printed = run_faulty(nursery, fault, write_recipe(recipe, values))
    assert codes == [0, 0] and "resuming at step 1" in printed, printed
    assert "no checkpoint to go back to" in printed and sorted(losses(tmp_path / "run")) == list(range(1, 13))


@pytest.mark.parametrize("action", [pytest.param("skip", marks=pytest.mark.slow), "rollback"])
def test_spikes_without_end_stop_the_run(tmp_path: Path, tiny_data: Path, nursery: Nursery, action: str) -> None:
    """A loss that stays high is no spike: neither does a run leave out every update, nor go back for ever."""
    faults = {"spike": 2.0, "spike_window": 3, "on_spike": action, "max_non_finite": 2}
    values = recipe_values(tiny_data, tmp_path / "run", faults=faults, checkpoint={"every": 3, "keep": 9})
    fault = {"rank": 0, "spike_samples": list(range(56, 500))}
    codes, printed = run_faulty(nursery, fault, write_recipe(tmp_path / "r.yaml", values))
    assert codes == [2, 2] and "raise faults.spike" in printed, printed
    found = [(e["event"], e["step"]) for e in metrics(tmp_path / "run", "event") if e["event"] != "started"]
    if action == "skip":
        assert found == [("spike", 8), ("spike", 9)] and "2 steps in a row were left out" in printed
    else:
        assert found == [("spike", 8), ("rollback", 6), ("spike", 7), ("rollback", 6), ("spike", 7)]
        assert "gone back to step 6 2 times" in printed
    assert json.loads((tmp_path / "run" / "status.json").read_text(encoding="utf-8"))["state"] == "failed"


def test_a_stalled_rank_is_named_and_the_job_ends(tmp_path: Path, tiny_data: Path, nursery: Nursery) -> None:
    """Rank 1 never gets past its batch of step 6: both ranks end with the documented code and leave their stacks."""
    values = recipe_values(tiny_data, tmp_path / "run", limits={"stall_seconds": 8.0})
    fault = {"rank": 1, "stall_samples": [40]}
    codes, printed = run_faulty(nursery, fault, write_recipe(tmp_path / "r.yaml", values))
    assert codes == [EXIT_STALLED, EXIT_STALLED], printed
    (incident,) = [entry for entry in (tmp_path / "run" / "stacks").iterdir() if entry.is_dir()]
    stacks = [(incident / f"rank-0000{rank}.txt").read_text(encoding="utf-8") for rank in (0, 1)]
    assert "wait_for_a_disk_that_is_gone" in stacks[1] and "wait_for_a_disk_that_is_gone" not in stacks[0]
    assert all("step 5" in stack for stack in stacks)
    assert "rank 1" in (incident / "report.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("ends", ["limit of the recipe", "end of the Slurm job"])
def test_a_limit_in_time_ends_a_run_with_a_checkpoint(
    tmp_path: Path, tiny_data: Path, nursery: Nursery, ends: str
) -> None:
    """Where less than two minutes are left, one step is done."""
    limit = {"wall_clock_hours": 0.02} if ends == "limit of the recipe" else {}
    extra = {} if limit else {"SLURM_JOB_END_TIME": str(int(time.time()) + 100)}
    values = recipe_values(tiny_data, tmp_path / "run", limits=limit, checkpoint={"every": 0})
    job = Job(write_recipe(tmp_path / "r.yaml", values), extra=extra, nursery=nursery)
    codes, output, errors = job.wait()
    assert codes == [75] and "stopped after 1 of 12" in errors and "is near" in errors, output + errors
    assert find_damage(tmp_path / "run" / "checkpoints" / "step-00000001") is None
