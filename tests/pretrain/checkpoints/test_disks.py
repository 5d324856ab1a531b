"""Disks that are full, slow or hiccup: a checkpoint is lost at most, and the run goes on."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data_prep.errors import DataError
from pretrain.checkpoints.checkpoint_engine import CheckpointFiles
from pretrain.checkpoints.checkpoint_manifest import TrainState
from pretrain.checkpoints.store import CheckpointStore, find_damage
from pretrain.recipe.plan import make_plan
from pretrain.recipe.recipe import build_recipe
from pretrain.records.run_folder import RunFolder
from pretrain.records.telemetry import Telemetry
from tests.pretrain.collectives import Threads
from tests.pretrain.payloads import SHAPE
from tests.pretrain.support import (
    EVERY_FOUR,
    Nursery,
    Workers,
    losses,
    metrics,
    recipe_values,
    run_faulty,
    write_recipe,
)


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(
    tmp_path: Path, tiny_data: Path, undisturbed: Path, nursery: Nursery
) -> None:
    values = recipe_values(tiny_data, tmp_path / "run", checkpoint=EVERY_FOUR)
    fault = {"rank": 0, "full_step": "step-00000008"}
    codes, printed = run_faulty(nursery, fault, write_recipe(tmp_path / "r.yaml", values))
    assert codes == [0, 0] and "the disk is full" in printed, printed
    names = sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["latest", "step-00000004", "step-00000009", "step-00000012"], "tried again a step later"
    assert losses(tmp_path / "run") == losses(undisturbed)


@pytest.mark.parametrize(
    ("full", "follows"),
    [
        ("step-", "starts over, because there is no checkpoint"),
        pytest.param("step-0000001", "goes on from its checkpoint of step 9", marks=pytest.mark.slow),
    ],
)
def test_what_is_left_on_a_disk_that_stays_full_is_said(
    tmp_path: Path, tiny_data: Path, nursery: Nursery, full: str, follows: str
) -> None:
    values = recipe_values(tiny_data, tmp_path / "run", checkpoint={"every": 9}, evaluation={"every": 0})
    fault = {"rank": 0, "full_step": full, "full_weights": True}
    codes, printed = run_faulty(nursery, fault, write_recipe(tmp_path / "r.yaml", values))
    assert codes == [2, 2], printed
    assert "final weights could not be written" in printed and f"start the run again, which {follows}." in printed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of a given size in bytes; requires root."""
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


def test_a_write_that_fails_once_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain.checkpoints import checkpoint_engine as checkpoint_files

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


def test_a_run_folder_that_cannot_be_made_again_costs_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was removed while training, and its data set too."""

    recipe = build_recipe(recipe_values(tmp_path, tmp_path))

    def restore() -> None:
        raise DataError("the tokenizer is missing")

    def rank(_: int) -> str | None:
        engine = SimpleNamespace(save_checkpoint=lambda *_, **__: None)
        store = CheckpointStore(tmp_path, engine, recipe.checkpoint, make_plan(recipe), describe=SHAPE, restore=restore)
        store.begin(TrainState(step=4))
        return store.finish(4)

    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    assert Threads(1, monkeypatch).each(rank) == [f"{tmp_path / 'step-00000004'}: the tokenizer is missing"]


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
    tmp_path: Path, tiny_data: Path, undisturbed: Path, nursery: Nursery
) -> None:
    """A disk that takes the checkpoint of step 4 only after step 6 is recorded: whoever waited for it would wait for
    ever.
    """
    checkpoint = {"every": 4, "keep": 9, "asynchronous": True}
    values = recipe_values(tiny_data, tmp_path / "run", checkpoint=checkpoint, limits={"stall_seconds": 60.0})
    fault = {"rank": 0, "slow_step": "step-00000004", "until": 6}
    codes, printed = run_faulty(nursery, fault, write_recipe(tmp_path / "r.yaml", values))
    assert codes == [0, 0], printed
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(entry.name for entry in checkpoints.glob("step-*")) == [f"step-{n:08d}" for n in (4, 8, 12)]
    assert all(find_damage(folder) is None for folder in checkpoints.glob("step-*"))
    assert losses(tmp_path / "run") == losses(undisturbed)
