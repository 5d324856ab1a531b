"""What goes wrong is said in one sentence before training, or survived during it."""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import provenance
from pretrain.agreement import find_disagreement
from pretrain.checkpoint import find_damage
from pretrain.checkpoint_files import CheckpointFiles
from pretrain.prepare import Prepared, prepare
from pretrain.provenance import identity
from pretrain.recipe import build_recipe
from pretrain.run_folder import RunFolder
from pretrain.signals import EXIT_STALLED
from pretrain.telemetry import Telemetry
from tests.pretrain.support import (
    ALONE,
    ROOT,
    Job,
    Nursery,
    Workers,
    environment,
    losses,
    make_dataset,
    metrics,
    recipe_values,
    tiny_model,
    write_recipe,
)


def refused(one_rank: Workers, folder: Path, values: dict[str, Any], *parts: str) -> None:
    """Refused with one line that holds `parts`, exit code 2, and nothing written."""
    code, printed = one_rank.run("--config", str(write_recipe(folder / "r.yaml", values)))
    assert code == 2, printed
    assert printed.count("\n") == 1 and "Traceback" not in printed, printed
    for part in parts:
        assert part in printed, printed
    assert not Path(values["run_dir"]).exists()


def test_wrong_recipes_and_configurations_are_refused(tmp_path: Path, tiny_data: Path, one_rank: Workers) -> None:
    values = recipe_values(tiny_data, tmp_path / "run")
    refused(one_rank, tmp_path, {**values, "optim": {"lrr": 1.0}}, "optim.lrr", "did you mean 'optim.lr'")
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "overlap_com": True}}), encoding="utf-8")
    wrong = {**values, "deepspeed": {"config": str(file)}}
    refused(one_rank, tmp_path, wrong, "zero_optimization.overlap_com", "did you mean 'zero_optimization.overlap_comm'")
    refused(one_rank, tmp_path, {**values, "precision": "bf16", "deepspeed": {"config": "zero0"}}, "stage 0")
    refused(one_rank, tmp_path, {**values, "precision": "fp16"}, "fp16 wants a GPU")


def test_wrong_data_is_refused(tmp_path: Path, tiny_data: Path, one_rank: Workers) -> None:
    for damage in ("missing", "truncated", "foreign"):
        data = tmp_path / damage
        shutil.copytree(tiny_data, data)
        shard = data / "train-00000.bin"
        if damage == "missing":
            shard.unlink()
        elif damage == "truncated":
            shard.write_bytes(shard.read_bytes()[:-10])
        else:
            shutil.copytree(make_dataset(tmp_path / "other", documents=250, seed=9), data, dirs_exist_ok=True)
            shutil.copy2(tiny_data / "manifest.json", data)
        refused(one_rank, tmp_path, recipe_values(data, tmp_path / "run"), "train-00000")
    values = recipe_values(tiny_data, tmp_path / "run", data={"path": str(tmp_path)})
    refused(one_rank, tmp_path, values, str(tmp_path), "manifest.json")
    other = make_dataset(tmp_path / "tokenized-otherwise", fingerprint="e" * 64)
    values["data"] = {"sources": [{"path": str(tiny_data)}, {"path": str(other)}]}
    refused(one_rank, tmp_path, values, "different tokenizers")


def test_changed_data_or_tokenizer_stops_a_run_from_going_on(tmp_path: Path, one_rank: Workers) -> None:
    data = make_dataset(tmp_path / "data")
    values = recipe_values(data, tmp_path / "run", checkpoint={"every": 0})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()
    recipe = write_recipe(tmp_path / "r.yaml", values)
    assert one_rank.run("--config", str(recipe))[0] == 76
    shutil.rmtree(data)
    make_dataset(data, fingerprint="e" * 64)
    code, printed = one_rank.run("--config", str(recipe))
    assert code == 2 and "the tokenizer has changed" in printed
    shutil.rmtree(data)
    make_dataset(data, documents=200)
    code, printed = one_rank.run("--config", str(recipe))
    assert code == 2 and "the data has changed" in printed


def test_a_mixture_may_move_and_a_changed_part_is_named(tmp_path: Path, one_rank: Workers) -> None:
    make_dataset(tmp_path / "web")
    make_dataset(tmp_path / "code", seed=5)
    sources = [{"path": str(tmp_path / name), "name": name, "weight": 1.0} for name in ("web", "code")]
    values = recipe_values(tmp_path, tmp_path / "run", data={"sources": sources})
    (tmp_path / "run").mkdir()
    recipe = write_recipe(tmp_path / "r.yaml", values)

    def one_step() -> tuple[int, str]:
        (tmp_path / "run" / "stop").touch()
        return one_rank.run("--config", str(write_recipe(recipe, values)))

    assert one_step()[0] == 76
    (tmp_path / "code").rename(tmp_path / "moved")
    sources[1]["path"] = str(tmp_path / "moved")
    code, printed = one_step()
    assert code == 76 and "resuming at step 1" in printed, printed
    sources[1]["weight"] = 2.0
    code, printed = one_step()
    assert code == 2 and "data.sources.1.weight = 1.0, but the recipe now says 2.0" in printed, printed
    sources[1] |= {"weight": 1.0, "path": str(tmp_path / "web")}
    code, printed = one_step()
    assert code == 2 and "the data has changed" in printed, printed


def test_the_command_prints_the_message_alone(tmp_path: Path, tiny_data: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", recipe_values(tiny_data, tmp_path / "run"))
    command = [str(Path(sys.executable).parent / "mor"), "train", str(recipe), "optim.lrr=1e-3"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"mor train: {recipe}: unknown key 'optim.lrr'; did you mean 'optim.lr'?\n"


def test_a_rank_with_another_recipe_is_named(tmp_path: Path, tiny_data: Path) -> None:
    """Two ranks of one job with different seeds: both end, and the message names what differs."""
    values = recipe_values(tiny_data, tmp_path / "run")
    recipe = write_recipe(tmp_path / "r.yaml", values)
    job = Job(recipe, ranks=2, vary=lambda rank: [f"seed={rank}"])
    codes, _, errors = job.wait()
    assert codes == [2, 2] and "do not agree on recipe" in errors and "rank 1" in errors
    assert not (tmp_path / "run").exists() or not (tmp_path / "run" / "recipe.yaml").exists()


def test_the_rank_that_differs_from_the_majority_is_named() -> None:
    facts = [{"code": "a", "seed": "1"}] * 4
    assert find_disagreement(facts) is None
    odd = [*facts[:2], {"code": "b", "seed": "1"}, facts[3]]
    message = find_disagreement(odd)
    assert message is not None and "code" in message and "rank 2 has b" in message and "rank 1" not in message
    missing = find_disagreement([facts[0], {"code": "a"}, facts[0]])
    assert missing is not None and "seed" in missing and "rank 1 has absent" in missing


def run_with(nursery: Nursery, fault: dict[str, Any], recipe: Path) -> tuple[list[int], str]:
    """Train on two ranks of a machine where something breaks (see `tests.pretrain.faulty`)."""
    script = Path(__file__).parent / "faulty.py"
    job = Job(recipe, ranks=2, extra={"FAULT": json.dumps(fault)}, script=script, nursery=nursery)
    codes, output, errors = job.wait()
    return codes, output + errors


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
    codes, printed = run_with(nursery, {"rank": 1, "nan_samples": [33]}, write_recipe(tmp_path / "r.yaml", values))
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
    codes, printed = run_with(nursery, fault, write_recipe(tmp_path / "r.yaml", values))
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
    codes, printed = run_with(nursery, fault, write_recipe(tmp_path / "r.yaml", values))
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
    codes, printed = run_with(nursery, fault, write_recipe(recipe, values))
    assert codes == [0, 0] and "resuming at step 1" in printed, printed
    assert "no checkpoint to go back to" in printed and sorted(losses(tmp_path / "run")) == list(range(1, 13))


@pytest.mark.parametrize("action", [pytest.param("skip", marks=pytest.mark.slow), "rollback"])
def test_spikes_without_end_stop_the_run(tmp_path: Path, tiny_data: Path, nursery: Nursery, action: str) -> None:
    """A loss that stays high is no spike: neither does a run leave out every update, nor go back for ever."""
    faults = {"spike": 2.0, "spike_window": 3, "on_spike": action, "max_non_finite": 2}
    values = recipe_values(tiny_data, tmp_path / "run", faults=faults, checkpoint={"every": 3, "keep": 9})
    fault = {"rank": 0, "spike_samples": list(range(56, 500))}
    codes, printed = run_with(nursery, fault, write_recipe(tmp_path / "r.yaml", values))
    assert codes == [2, 2] and "raise faults.spike" in printed, printed
    found = [(e["event"], e["step"]) for e in metrics(tmp_path / "run", "event") if e["event"] != "started"]
    if action == "skip":
        assert found == [("spike", 8), ("spike", 9)] and "2 steps in a row were left out" in printed
    else:
        assert found == [("spike", 8), ("rollback", 6), ("spike", 7), ("rollback", 6), ("spike", 7)]
        assert "gone back to step 6 2 times" in printed
    assert json.loads((tmp_path / "run" / "status.json").read_text(encoding="utf-8"))["state"] == "failed"


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(
    tmp_path: Path, tiny_data: Path, two_ranks: Workers, nursery: Nursery
) -> None:
    values = recipe_values(tiny_data, tmp_path / "run", checkpoint={"every": 4, "keep": 9})
    fault = {"rank": 0, "full_step": "step-00000008"}
    codes, printed = run_with(nursery, fault, write_recipe(tmp_path / "r.yaml", values))
    assert codes == [0, 0] and "the disk is full" in printed, printed
    names = sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["latest", "step-00000004", "step-00000009", "step-00000012"], "tried again a step later"
    whole = two_ranks.train(tmp_path, {**values, "run_dir": str(tmp_path / "whole")})
    assert losses(tmp_path / "run") == losses(whole)


@pytest.mark.parametrize(
    ("full", "follows"),
    [
        ("step-", "begins anew, for it has no checkpoint"),
        pytest.param("step-0000001", "goes on from its checkpoint of step 9", marks=pytest.mark.slow),
    ],
)
def test_what_is_left_on_a_disk_that_stays_full_is_said(
    tmp_path: Path, tiny_data: Path, nursery: Nursery, full: str, follows: str
) -> None:
    values = recipe_values(tiny_data, tmp_path / "run", checkpoint={"every": 9}, evaluation={"every": 0})
    fault = {"rank": 0, "full_step": full, "full_weights": True}
    codes, printed = run_with(nursery, fault, write_recipe(tmp_path / "r.yaml", values))
    assert codes == [2, 2], printed
    assert "final weights could not be written" in printed and f"start the run again, which {follows}." in printed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many bytes; wants root."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size: int) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_leaves_the_older_checkpoint_valid(
    tmp_path: Path, tiny_data: Path, two_ranks: Workers, small_disk: Callable[[int], Path]
) -> None:
    """A file system with room for one checkpoint and a half: the second never fits, and training goes on to its end."""
    values = recipe_values(tiny_data, tmp_path / "whole", checkpoint={"every": 4, "keep": 9}, evaluation={"every": 0})
    whole = two_ranks.train(tmp_path, values)
    files = [(file, -(-file.stat().st_size // 4096) * 4096) for file in whole.rglob("*") if file.is_file()]
    checkpoint = sum(size for file, size in files if file.parent.name == "step-00000004")
    others = sum(size for file, size in files if not file.parent.name.startswith("step-"))
    disk = small_disk(checkpoint * 3 // 2 + others)
    code, printed = two_ranks.run(
        "--config", str(write_recipe(tmp_path / "r.yaml", {**values, "run_dir": str(disk / "run")}))
    )
    assert code == 0 and "No checkpoint at step 8" in printed and "the disk is full" in printed, printed
    run = disk / "run"
    assert sorted(entry.name for entry in (run / "checkpoints").iterdir()) == ["latest", "step-00000004"]
    assert (run / "checkpoints" / "latest").read_text(encoding="utf-8") == "step-00000004\n"
    assert find_damage(run / "checkpoints" / "step-00000004") is None
    assert losses(run) == losses(whole)


def test_a_run_that_cannot_be_begun_says_where_and_can_be_started_again(
    tmp_path: Path, tiny_data: Path, one_rank: Workers, small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(1_000_000)
    recipe = write_recipe(tmp_path / "r.yaml", recipe_values(tiny_data, disk / "run", checkpoint={"every": 0}))
    ballast = (disk / "ballast").open("wb", buffering=0)
    with pytest.raises(OSError, match="No space"):
        while True:
            ballast.write(bytes(4096))
    code, printed = one_rank.run("--config", str(recipe))
    assert code == 2 and f"{disk / 'run'}: the run cannot be begun there" in printed and "No space" in printed, printed
    ballast.close()
    (disk / "ballast").unlink()
    code, printed = one_rank.run("--config", str(recipe))
    assert code == 0, printed
    code, printed = one_rank.run("--config", str(recipe), "--run-dir=/proc/nowhere")
    assert code == 2 and "/proc/nowhere" in printed and "Traceback" not in printed, printed


def test_records_wait_for_a_full_disk(tmp_path: Path, tiny_data: Path, small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(200_000)
    recipe = build_recipe(recipe_values(tiny_data, disk / "run"))
    telemetry = Telemetry(RunFolder(disk / "run"), recipe, 12, active=True)
    ballast = (disk / "ballast").open("wb", buffering=0)
    with pytest.raises(OSError, match="No space"):
        while True:
            ballast.write(bytes(4096))
    for step in range(200):
        telemetry.record("train", {"step": step, "text": "x" * 100})
    (disk / "ballast").unlink()
    ballast.close()
    telemetry.record("train", {"step": 200})
    telemetry.close()
    assert [record["step"] for record in metrics(disk / "run", "train")] == list(range(201))


def test_a_stalled_rank_is_named_and_the_job_ends(tmp_path: Path, tiny_data: Path, nursery: Nursery) -> None:
    """Rank 1 never gets past its batch of step 6: both ranks end with the documented code and leave their stacks."""
    values = recipe_values(tiny_data, tmp_path / "run", limits={"stall_seconds": 8.0})
    fault = {"rank": 1, "stall_samples": [40]}
    codes, printed = run_with(nursery, fault, write_recipe(tmp_path / "r.yaml", values))
    assert codes == [EXIT_STALLED, EXIT_STALLED], printed
    (incident,) = [entry for entry in (tmp_path / "run" / "stacks").iterdir() if entry.is_dir()]
    stacks = [(incident / f"rank-0000{rank}.txt").read_text(encoding="utf-8") for rank in (0, 1)]
    assert "wait_for_a_disk_that_is_gone" in stacks[1] and "wait_for_a_disk_that_is_gone" not in stacks[0]
    assert all("step 5" in stack for stack in stacks)
    assert "rank 1" in (incident / "report.txt").read_text(encoding="utf-8")


def test_ranks_compare_everything_that_decides_a_run(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thing after the other changed on one rank; `require_agreement` compares by these names."""
    values = recipe_values(tiny_data, tmp_path / "run")
    prepared = prepare(build_recipe(values), ALONE)
    usual = identity(prepared)

    def differing(changed: Prepared) -> set[str]:
        other = identity(changed)
        message = find_disagreement([usual, other, usual])
        assert message is not None and "rank 1 has" in message
        return {name for name in usual if usual[name] != other[name]}

    assert differing(prepare(build_recipe({**values, "optim": {"lr": 0.02}}), ALONE)) == {"recipe"}
    assert differing(prepare(build_recipe({**values, "seed": 8}), ALONE)) == {"recipe", "seed"}
    data = dataclasses.replace(prepared.data, manifest="0" * 64, fingerprint="1" * 64)
    assert differing(dataclasses.replace(prepared, data=data)) == {"data", "tokenizer"}
    stage = {**prepared.ds_config, "zero_optimization": {"stage": 2}}
    assert differing(dataclasses.replace(prepared, ds_config=stage)) == {"DeepSpeed configuration"}
    copy = tmp_path / "copy"
    for package in ("pretrain", "mor_model", "data_prep"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "__file__", str(copy / "pretrain" / "provenance.py"))
    assert identity(prepared) == usual, "where the code lies does not matter"
    (copy / "mor_model" / "loss.py").open("a").write("# patched on one node\n")
    assert differing(prepared) == {"code"}
    monkeypatch.undo()
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.6" if name == "torch" else version(name))
    assert differing(prepared) == {"version of torch"}


def test_a_write_that_fails_once_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain import checkpoint_files

    real, attempts = checkpoint_files._save_hashed, []

    def flaky(state: Any, path: Path) -> dict[str, Any]:
        attempts.append(path)
        if len(attempts) == 1:
            raise OSError(errno.EIO, "the network file system hiccups")
        return real(state, path)

    monkeypatch.setattr(checkpoint_files, "_save_hashed", flaky)
    monkeypatch.setattr(checkpoint_files, "_RETRY_SECONDS", (0.0, 0.0))
    files = CheckpointFiles(asynchronous=False)
    files.start()
    files.save({"weights": torch.arange(5)}, str(tmp_path / "a.pt"))
    written, error = files.collect()
    assert error is None and len(attempts) == 2
    assert written["a.pt"]["bytes"] == (tmp_path / "a.pt").stat().st_size
    assert files.load(str(tmp_path / "a.pt"))["weights"].tolist() == [0, 1, 2, 3, 4]


def test_asynchronous_writing_keeps_the_values_of_its_moment(tmp_path: Path) -> None:
    files = CheckpointFiles(asynchronous=True)
    files.start()
    tensor = torch.ones(1000)
    files.save({"nested": [{"tensor": tensor}]}, str(tmp_path / "a.pt"))
    tensor.zero_()
    _, error = files.collect()
    files.close()
    assert error is None
    assert files.load(str(tmp_path / "a.pt"))["nested"][0]["tensor"].sum() == 1000


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, tiny_data: Path, two_ranks: Workers, nursery: Nursery
) -> None:
    """A disk that takes the checkpoint of step 4 only after step 6 is recorded: whoever waited for it would wait for
    ever.
    """
    checkpoint = {"every": 4, "keep": 9, "asynchronous": True}
    values = recipe_values(tiny_data, tmp_path / "run", checkpoint=checkpoint, limits={"stall_seconds": 60.0})
    fault = {"rank": 0, "slow_step": "step-00000004", "until": 6}
    codes, printed = run_with(nursery, fault, write_recipe(tmp_path / "r.yaml", values))
    assert codes == [0, 0], printed
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(entry.name for entry in checkpoints.glob("step-*")) == [f"step-{n:08d}" for n in (4, 8, 12)]
    assert all(find_damage(folder) is None for folder in checkpoints.glob("step-*"))
    whole = two_ranks.train(tmp_path, {**values, "run_dir": str(tmp_path / "whole")})
    assert losses(tmp_path / "run") == losses(whole)


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


def test_every_other_network_starts_too(tmp_path: Path, tiny_data: Path, one_rank: Workers) -> None:
    """Options of the recipe together: warm-ups, mixture, annealing, TensorBoard and offline wandb."""
    values = recipe_values(
        tiny_data,
        tmp_path / "run",
        model=tiny_model(),
        data={
            "sources": [
                {"path": str(tiny_data), "name": "one", "weight": 3.0},
                {"path": str(tiny_data), "name": "two", "weight": 1.0, "final_weight": 9.0},
            ],
            "anneal": 0.5,
        },
        batch={"sequences": 8, "micro_batch": 2, "sequence_length": 32, "warmup_from": 2, "warmup": 6},
        capacity_warmup={"length": 6},
        logging={"every": 1, "tensorboard": True, "wandb": "offline"},
    )
    run = one_rank.train(tmp_path, values)
    records = metrics(run, "train")
    # Three steps each of 2 and 4 sequences, then 8.
    assert [record["tokens"] // 32 for record in records] == [2, 4, 6, 10, 14, 18, 26, 34, 42, 50, 58, 66]
    assert [record["active"][2] for record in records][:2] == pytest.approx([1.0, 0.9375], abs=0.02)
    assert records[-1]["active"] == pytest.approx([1.0, 21 / 32, 10 / 32])
    assert sum(records[-1]["samples"].values()) == 66
    assert records[5]["samples"]["one"] == pytest.approx(13.5, abs=2)
    assert records[-1]["samples"]["two"] > 15
    assert list((run / "tensorboard").glob("events.*")) and list((run / "wandb").glob("offline-run-*"))
    assert {r["source"] for r in metrics(run, "validation")} == {"one/a", "one/b"}
