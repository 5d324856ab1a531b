"""Nothing is lost: killed, stopped and damaged runs go on and end exactly where the undisturbed one does."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.pretrain.payloads import Payload, rewrite_manifest
from tests.pretrain.support import (
    EVERY_FOUR,
    Job,
    Nursery,
    Workers,
    last_step,
    losses,
    make_dataset,
    metrics,
    recipe_values,
    tiny_model,
    train,
    write_recipe,
)

FAULTY = Path(__file__).resolve().parents[1] / "faulty.py"
STAGE_CHANGES = [("zero1", "zero3"), ("zero0", "zero3"), ("zero2", "zero0")]


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "weights" / "model.safetensors")


def assert_same_run(run: Path, undisturbed: Path) -> None:
    """Loss sequence, validation losses, counted FLOPs and final weights, all bit by bit."""
    assert losses(run) == losses(undisturbed)
    for kind, names in (
        ("train", ("tokens", "flops", "grad_norm", "lr")),
        ("validation", ("loss_causal", "loss_topk")),
    ):
        mine, theirs = metrics(run, kind), metrics(undisturbed, kind)
        assert [[r[name] for name in names] for r in mine] == [[r[name] for name in names] for r in theirs]
    mine, theirs = final_weights(run), final_weights(undisturbed)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def cut_back(whole: Path, values: dict[str, Any], folder: Path, step: int) -> Path:
    """What a kill right after the checkpoint of `step` leaves of a finished run: a copy of `whole` minus its end."""
    run = Path(values["run_dir"])
    if run != whole:
        shutil.copytree(whole, run)
    for later in sorted((run / "checkpoints").glob("step-*")):
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)
    (run / "checkpoints" / "latest").write_text(f"step-{step:08d}\n", encoding="utf-8")
    shutil.rmtree(run / "weights")
    (run / "status.json").write_text(json.dumps({"state": "running", "step": step, "steps": 12}), encoding="utf-8")
    return write_recipe(folder / f"{run.name}.yaml", values)


@pytest.mark.parametrize(
    ("stage", "precision", "router"),
    [
        ("zero3", "fp32", {"kind": "expert_choice"}),
        pytest.param(*("zero3", "bf16", {"kind": "expert_choice", "network": "random"}), marks=pytest.mark.slow),
        ("zero2", "bf16", {"kind": "token_choice", "balance": "bias"}),
        pytest.param(*("zero1", "bf16", {"kind": "expert_choice"}), marks=pytest.mark.slow),
        pytest.param(*("zero0", "fp32", {"kind": "expert_choice"}), marks=pytest.mark.slow),
    ],
)
def test_resuming_gives_the_undisturbed_run(
    tmp_path: Path, tiny_data: Path, two_ranks: Workers, stage: str, precision: str, router: dict[str, Any]
) -> None:
    """Resumed in the middle of the stable phase and in the middle of the decay, with records cut back to there."""
    values = recipe_values(
        tiny_data,
        tmp_path / "whole",
        precision=precision,
        model=tiny_model(router=router),
        deepspeed={"config": stage},
        checkpoint={"every": 5, "keep": 9},
        batch={"sequences": 12, "micro_batch": 2, "sequence_length": 32},
    )
    whole = two_ranks.train(tmp_path, values)
    for step in (5, 10):
        again = {**values, "run_dir": str(tmp_path / f"again{step}")}
        file = cut_back(whole, again, tmp_path, step)
        code, printed = two_ranks.run("--config", str(file))
        assert code == 0 and f"resuming at step {step}" in printed, printed
        assert_same_run(tmp_path / f"again{step}", whole)


@pytest.mark.slow
def test_killed_between_two_micro_batches_and_again_in_the_decay(
    tmp_path: Path, tiny_data: Path, undisturbed: Path, nursery: Nursery
) -> None:
    """Rank 1 dies with half of a step's gradients, of step 6 and, when that is made good, of step 10."""
    recipe = write_recipe(tmp_path / "r.yaml", recipe_values(tiny_data, tmp_path / "run", checkpoint=EVERY_FOUR))
    for sample, left in ((40, 4), (72, 8)):
        fault = {"FAULT": json.dumps({"rank": 1, "kill_samples": [sample]})}
        job = Job(recipe, ranks=2, extra=fault, script=FAULTY, nursery=nursery)
        codes, _, _ = job.wait(timeout=60)
        assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None), codes
        assert progress(tmp_path / "run") == left
        status = json.loads((tmp_path / "run" / "status.json").read_text(encoding="utf-8"))
        assert status["state"] == "failed", "what `mor runs` shows"
    train(recipe, ranks=2, nursery=nursery)
    assert_same_run(tmp_path / "run", undisturbed)


def test_killed_at_random_times_a_run_ends_as_the_undisturbed_one(tmp_path: Path, nursery: Nursery) -> None:
    assert torture(tmp_path, nursery, steps=60, kills=3, seed=0) == 3


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(("stage", "precision"), [("zero3", "fp32"), ("zero1", "bf16")])
def test_killed_thirteen_times_a_run_ends_as_the_undisturbed_one(
    tmp_path: Path, nursery: Nursery, stage: str, precision: str, asynchronous: bool
) -> None:
    """Fifty-two kills in four runs, each of which ends as if there had been none."""
    options = {"precision": precision, "deepspeed": {"config": stage}}
    assert torture(tmp_path, nursery, steps=120, kills=13, seed=1, asynchronous=asynchronous, **options) == 13


def torture(
    tmp_path: Path,
    nursery: Nursery,
    *,
    steps: int,
    kills: int,
    seed: int,
    asynchronous: bool = False,
    **options: Any,
) -> int:
    """Kill a random rank with SIGKILL at random times, often while a checkpoint is written; start again each time.

    The run sees its data several times. Returns how many kills met a running job; `steps` must leave room for them.
    """
    choice = random.Random(seed)
    data = make_dataset(tmp_path / "data", documents=60)
    checkpoint = {"every": 1, "keep": 2, "asynchronous": asynchronous}
    values = recipe_values(data, tmp_path / "whole", checkpoint=checkpoint, budget={"steps": steps}, **options)
    whole = tmp_path / "whole"
    train(write_recipe(tmp_path / "whole.yaml", values), ranks=2, nursery=nursery)
    run = tmp_path / "killed"
    recipe = write_recipe(tmp_path / "killed.yaml", {**values, "run_dir": str(run)})
    done = 0
    for _ in range(kills):
        before = progress(run)
        job = Job(recipe, ranks=2, nursery=nursery)
        target = before + choice.randint(0, 4)
        while job.running and progress(run) < target:
            time.sleep(0.002)
        time.sleep(choice.random() * 0.15)
        if not job.running:
            break
        # While ranks still look for each other it is their launcher that ends the others, and here is none.
        job.kill(signal.SIGKILL, rank=choice.randint(0, 1) if target > before else None)
        codes, _, _ = job.wait(timeout=60)
        assert all(code != 0 for code in codes), (
            "the other rank must not go on alone, nor wait for longer than a minute"
        )
        done += 1
    train(recipe, ranks=2, nursery=nursery)
    assert_same_run(run, whole)
    assert metrics(run, "train")[-1]["epochs"]["data"] > 2
    return done


def finished_checkpoints(run: Path) -> list[int]:
    """Steps of the checkpoints that a run has."""
    found = (run / "checkpoints").glob("step-*") if (run / "checkpoints").is_dir() else ()
    return sorted(int(folder.name.removeprefix("step-")) for folder in found)


def progress(run: Path) -> int:
    """Last finished checkpoint."""
    return max(finished_checkpoints(run), default=0)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_on_one_rank_stops_all_with_a_checkpoint(tmp_path: Path, tiny_data: Path, number: int) -> None:
    values = recipe_values(tiny_data, tmp_path / "run", budget={"steps": 4000}, checkpoint={"every": 0})
    recipe = write_recipe(tmp_path / "r.yaml", values)
    job = Job(recipe, ranks=2)
    # No rank ends a step before all have begun one, and so have handlers for signals.
    while job.running and last_step(tmp_path / "run") == 0:
        time.sleep(0.05)
    job.kill(number, rank=1)
    codes, _, errors = job.wait(timeout=120)
    assert codes == [75, 75], errors
    assert "steps (rank 1 was asked to)" in errors
    status = json.loads((tmp_path / "run" / "status.json").read_text(encoding="utf-8"))
    assert status["state"] == "stopped" and progress(tmp_path / "run") == status["step"] > 0


def test_the_stop_file_holds_a_run_and_the_checkpoint_file_does_not(
    tmp_path: Path, tiny_data: Path, two_ranks: Workers
) -> None:
    values = recipe_values(tiny_data, tmp_path / "run", checkpoint={"every": 0, "keep": 3})
    recipe = write_recipe(tmp_path / "r.yaml", values)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()
    code, printed = two_ranks.run("--config", str(recipe))
    assert code == 76 and "stopped after 1 of 12" in printed
    assert not (tmp_path / "run" / "stop").exists() and progress(tmp_path / "run") == 1
    (tmp_path / "run" / "checkpoint").touch()
    code, printed = two_ranks.run("--config", str(recipe))
    assert code == 0 and "resuming at step 1" in printed
    assert sorted(f.name for f in (tmp_path / "run" / "checkpoints").glob("step-*")) == [
        "step-00000002",
        "step-00000008",
        "step-00000012",
    ]


def replace_text(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, tiny_data: Path, undisturbed: Path, two_ranks: Workers
) -> None:
    damages = {
        "flipped": lambda file: file.write_bytes(file.read_bytes()[:-100] + b"?" * 100),
        "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
        "moved": lambda file: replace_text(file.with_name("checkpoint.json"), '"position": 64', '"position": 56'),
        "gone": lambda file: file.unlink(),
    }
    for name, damage in damages.items():
        values = recipe_values(tiny_data, tmp_path / name, checkpoint=EVERY_FOUR)
        file = cut_back(undisturbed, values, tmp_path, 8)
        damage(next((tmp_path / name / "checkpoints" / "step-00000008").glob("*rank_1*optim_states.pt")))
        code, printed = two_ranks.run("--config", str(file))
        assert code == 0 and "step-00000008 is damaged" in printed and "resuming at step 4" in printed
        assert_same_run(tmp_path / name, undisturbed)
    for manifest in (tmp_path / "gone" / "checkpoints").glob("step-*/checkpoint.json"):
        manifest.write_text("{", encoding="utf-8")
    (tmp_path / "gone" / "status.json").write_text('{"state": "running"}', encoding="utf-8")
    code, printed = two_ranks.run("--config", str(file))
    assert code == 2 and "damaged" in printed and "Traceback" not in printed


def test_what_a_start_went_back_past_neither_counts_nor_stays(
    tmp_path: Path, tiny_data: Path, undisturbed: Path, two_ranks: Workers
) -> None:
    """The one checkpoint to keep is the newest sound one, not the damaged one with the highest number."""
    values = recipe_values(tiny_data, tmp_path / "again", checkpoint=EVERY_FOUR)
    file = cut_back(undisturbed, values, tmp_path, 8)
    folder = tmp_path / "again" / "checkpoints"
    next((folder / "step-00000008").glob("*optim_states.pt")).unlink()
    shutil.copytree(folder / "step-00000004", folder / ".step-00000003.writing")
    # A start that ends before it has written one of its own: no step is left to profile.
    code, printed = two_ranks.run("--config", str(file), "--profile=1")
    assert code == 2 and "--profile" in printed, printed
    assert (folder / "latest").read_text(encoding="utf-8") == "step-00000004\n"
    (tmp_path / "again" / "stop").touch()
    code, printed = two_ranks.run("--config", str(file), "checkpoint.keep=1")
    assert code == 76 and "stopped after 5 of 12" in printed, printed
    assert sorted(entry.name for entry in folder.iterdir()) == ["latest", "step-00000005"]
    assert (folder / "latest").read_text(encoding="utf-8") == "step-00000005\n"
    code, printed = two_ranks.run("--config", str(file))
    assert code == 0 and "resuming at step 5" in printed, printed
    assert_same_run(tmp_path / "again", undisturbed)


def test_the_best_checkpoint_is_written_and_stays(tmp_path: Path, tiny_data: Path, two_ranks: Workers) -> None:
    """Also where no checkpoint would be due; and it is the best of all starts."""
    checkpoint = {"every": 0, "keep": 1, "keep_best": True}
    values = recipe_values(tiny_data, tmp_path / "run", checkpoint=checkpoint, evaluation={"every": 5, "sequences": 2})
    run = two_ranks.train(tmp_path, {**values, "checkpoint": {**checkpoint, "keep": 9}})
    causal: dict[int, float] = {}
    for record in metrics(run, "validation"):
        causal[record["step"]] = causal.get(record["step"], 0.0) + record["loss_causal"]
    assert causal[12] < causal[10] < causal[5], "it learns"
    assert finished_checkpoints(run) == [5, 8, 10, 12], "8 is where the learning rate begins to fall"
    file = cut_back(run, values, tmp_path, 5)
    rewrite_manifest(run / "checkpoints" / "step-00000005", best_validation=[0.0, 5])
    code, printed = two_ranks.run("--config", str(file))
    assert code == 0 and "resuming at step 5" in printed, printed
    assert finished_checkpoints(run) == [5, 8, 12], "nothing after it was better"


def test_another_shape_is_refused_and_another_world_size_converted(
    tmp_path: Path, tiny_data: Path, two_ranks: Workers, one_rank: Workers
) -> None:
    # Loss-free balancing, so that there is a buffer to carry over.
    model = tiny_model(router={"kind": "token_choice", "balance": "bias", "bias_update_rate": 0.05})
    values = recipe_values(tiny_data, tmp_path / "run", checkpoint={"every": 4, "keep": 9}, model=model)
    whole = two_ranks.train(tmp_path, {**values, "run_dir": str(tmp_path / "whole")})
    file = cut_back(whole, values, tmp_path, 8)
    # Somebody else's, which looks as if it had been converted already.
    converted = tmp_path / "run" / "checkpoints" / ".step-00000008.universal"
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-00000008", converted)
    (converted / "zero").mkdir()
    for planted in (*converted.glob("*.pt"), converted / "zero" / "optimizer_state.pt"):
        torch.save(Payload(tmp_path / "was-run"), planted)
    code, printed = one_rank.run("--config", str(file))
    assert code == 2 and "world_size 2" in printed and "checkpoint.universal=true" in printed
    code, printed = two_ranks.run("--config", str(file), "deepspeed.config=zero2")
    assert code == 2 and "zero_stage 3" in printed
    code, printed = one_rank.run("--config", str(file), "checkpoint.universal=true")
    assert code == 0 and "resuming at step 8" in printed, printed
    assert not (tmp_path / "was-run").exists()
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), abs=1e-5)
    for name, tensor in final_weights(tmp_path / "run").items():
        torch.testing.assert_close(tensor, final_weights(whole)[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("stage", ["zero0", *(pytest.param(s, marks=pytest.mark.slow) for s in ("zero1", "zero2"))])
def test_more_ranks_go_on_with_what_fewer_have_begun_and_again(
    tmp_path: Path, tiny_data: Path, two_ranks: Workers, one_rank: Workers, stage: str
) -> None:
    """From one rank to two for a step, and on from the checkpoint that those have written."""
    values = recipe_values(tiny_data, tmp_path / "run", checkpoint={"every": 4, "keep": 9}, deepspeed={"config": stage})
    whole = one_rank.train(tmp_path, {**values, "run_dir": str(tmp_path / "whole")})
    file = cut_back(whole, values, tmp_path, 8)
    (tmp_path / "run" / "stop").touch()
    code, printed = two_ranks.run("--config", str(file), "checkpoint.universal=true")
    assert code == 76 and "resuming at step 8" in printed, printed
    code, printed = two_ranks.run("--config", str(file))
    assert code == 0 and "resuming at step 9" in printed, printed
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), abs=1e-5)
    for name, tensor in final_weights(tmp_path / "run").items():
        torch.testing.assert_close(tensor, final_weights(whole)[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("before", "after"), [("zero3", "zero2"), *(pytest.param(*p, marks=pytest.mark.slow) for p in STAGE_CHANGES)]
)
def test_another_stage_carries_the_weights_and_says_what_it_does_not(
    tmp_path: Path, tiny_data: Path, two_ranks: Workers, before: str, after: str
) -> None:
    model = tiny_model(router={"kind": "token_choice", "balance": "bias", "bias_update_rate": 0.05})
    shared = {"model": model, "checkpoint": {"every": 4, "keep": 9}, "deepspeed": {"config": before}}
    whole = two_ranks.train(tmp_path, recipe_values(tiny_data, tmp_path / "whole", **shared))
    values = recipe_values(tiny_data, tmp_path / "run", **shared)
    file = cut_back(whole, values, tmp_path, 8)
    change = f"deepspeed.config={after}"
    code, printed = two_ranks.run("--config", str(file), change)
    assert code == 2 and f"zero_stage {before[-1]}" in printed and "checkpoint.weights_only=true" in printed
    code, printed = two_ranks.run("--config", str(file), change, "checkpoint.weights_only=true")
    assert code == 0 and "resuming at step 8" in printed, printed
    assert "the optimiser's moments and the loss scale are not" in printed
    found, expected = losses(tmp_path / "run"), losses(whole)
    # The ninth loss comes of the carried weights, biases and samples alone; later ones of new moments.
    assert [found[n] for n in range(1, 10)] == pytest.approx([expected[n] for n in range(1, 10)], abs=1e-5)
    assert found[12] != pytest.approx(expected[12], abs=1e-5)
    assert not list((tmp_path / "run" / "checkpoints").glob(".step-*"))


def test_rotation_keeps_what_the_recipe_says(tmp_path: Path, tiny_data: Path, two_ranks: Workers) -> None:
    checkpoint = {"every": 1, "keep": 2, "keep_every": 5, "log_spaced": True, "keep_best": True}
    values = recipe_values(tiny_data, tmp_path / "run", checkpoint=checkpoint, evaluation={"every": 7, "sequences": 2})
    run = two_ranks.train(tmp_path, values)
    kept = [int(folder.name.removeprefix("step-")) for folder in sorted((run / "checkpoints").glob("step-*"))]
    assert kept == [1, 2, 4, 5, 8, 10, 11, 12]
    assert (run / "checkpoints" / "latest").read_text(encoding="utf-8") == "step-00000012\n"


def test_asynchronous_checkpoints_are_as_good(
    tmp_path: Path, tiny_data: Path, undisturbed: Path, two_ranks: Workers
) -> None:
    values = recipe_values(tiny_data, tmp_path / "again", checkpoint={**EVERY_FOUR, "asynchronous": True})
    file = cut_back(two_ranks.train(tmp_path, values), values, tmp_path, 4)
    code, printed = two_ranks.run("--config", str(file))
    assert code == 0 and "resuming at step 4" in printed, printed
    assert_same_run(tmp_path / "again", undisturbed)
