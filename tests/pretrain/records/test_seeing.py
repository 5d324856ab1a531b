"""What a run tells about itself: parts of a step, communication, profiles, mirrors, the progress line."""

from __future__ import annotations

import gzip
import json
import mmap
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mor_model.flops import flops_per_sequence
from pretrain.errors import LaunchError
from pretrain.recipe.recipe import build_recipe, load_recipe
from pretrain.records.communication import timed_collectives
from pretrain.records.profiling import parse_steps
from pretrain.records.run_folder import RunFolder
from pretrain.records.stopwatch import Stopwatch, memory_bytes, peak_memory_bytes
from pretrain.records.telemetry import Telemetry, rewind_metrics
from pretrain.training.engine import peak_flops
from tests.conftest import skip_or_fail
from tests.pretrain.support import LENGTH, Job, Workers, metrics, recipe_values, write_recipe

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still until a test moves it."""
    now = SimpleNamespace(time=0.0)
    monkeypatch.setattr("pretrain.records.stopwatch.time", SimpleNamespace(perf_counter=lambda: now.time))
    return now


def test_a_part_does_not_count_what_lies_in_parts_inside_it(clock: SimpleNamespace) -> None:
    watch = Stopwatch(CPU)
    for _ in range(2):
        with watch.part("backward"):
            clock.time += 3
            with watch.part("communication"):
                clock.time += 1
                with watch.part("communication"):
                    clock.time += 0.5
            clock.time += 2
    assert watch.take() == {"backward": 10, "communication": 3}
    with watch.part("forward"):
        clock.time += 1
    with watch.paused(), watch.part("forward"):
        clock.time += 8
    assert watch.take() == {"backward": 0, "communication": 0, "forward": 1}
    assert watch.total() == {"backward": 10, "communication": 3, "forward": 1}


def test_collectives_and_waiting_for_them_are_communication(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Work:
        def wait(self) -> str:
            clock.time += 4
            return "done"

        def is_completed(self) -> bool:
            return True

    class Backend:
        def all_reduce(self, tensor: int, async_op: bool = False) -> Work | None:
            clock.time += 1
            return Work() if async_op else None

    from deepspeed.comm import comm

    backend = Backend()
    monkeypatch.setattr(comm, "cdb", backend)
    watch = Stopwatch(CPU)
    with timed_collectives(watch, lambda: None), watch.part("backward"):
        clock.time += 10
        assert comm.cdb.all_reduce(7) is None
        work = comm.cdb.all_reduce(7, async_op=True)
        clock.time += 20
        assert work.is_completed() and work.wait() == "done"
    assert watch.take() == {"backward": 30, "communication": 6}
    assert not vars(backend), "DeepSpeed's functions are its own again"


def test_memory_is_that_of_this_process() -> None:
    # A mapping of its own: what the allocator gives out may have been resident before, and may stay so afterwards.
    with mmap.mmap(-1, 64 << 20) as block:
        block.write(b"x" * len(block))
        now, peak = memory_bytes(CPU), peak_memory_bytes(CPU)
        assert 0 < now <= peak
    assert memory_bytes(CPU) < now - (32 << 20) and peak_memory_bytes(CPU) >= now


@pytest.mark.parametrize(
    ("name", "promised"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H20", None),  # neither an H200 nor anything else that is known
    ],
)
def test_what_a_gpu_promises(name: str, promised: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == promised
    assert peak_flops(torch.device("cpu")) is None


def test_steps_to_profile() -> None:
    assert parse_steps("5-7") == (5, 7) and parse_steps("3") == (3, 3)
    for wrong in ("", "0", "7-5", "a-b", "3-", "-3", "1.5"):
        with pytest.raises(LaunchError, match="such as 5-7"):
            parse_steps(wrong)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, two_ranks: Workers) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("profiled")
    values = recipe_values(tiny_data, folder / "run", logging={"every": 4, "tensorboard": True, "wandb": "offline"})
    recipe = write_recipe(folder / "r.yaml", values)
    code, printed = two_ranks.run("--config", str(recipe), "--profile", "3-5")
    assert code == 0, printed
    return folder / "run", printed


def test_a_profile_says_where_the_time_went(profiled: tuple[Path, str]) -> None:
    run, printed = profiled
    folder = run / "profile" / "steps-3-5"
    table = (folder / "table.txt").read_text(encoding="utf-8")
    assert table.strip() in printed
    for rank in range(2):
        with gzip.open(folder / f"rank-{rank:05d}.trace.json.gz", "rt", encoding="utf-8") as stream:
            events = json.load(stream)["traceEvents"]
        names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
        # Two micro-batches a step on each rank, three steps.
        assert names.count("step/forward") == names.count("step/backward") == 6
        assert names.count("step/optimizer") == 3 and names.count("step/communication") > 3
    parts, operations = table.split("\n\n")[1:3]
    shares = {line[:48].strip(): float(line.split()[-1].rstrip("%")) for line in parts.splitlines()[1:]}
    assert {"data", "forward", "backward", "optimizer", "communication", "everything else"} == shares.keys()
    assert sum(shares.values()) == pytest.approx(100, abs=0.5)
    assert "aten::" in operations and "MiB net" in operations


def test_steps_that_are_not_ahead_are_not_profiled(profiled: tuple[Path, str], two_ranks: Workers) -> None:
    recipe = profiled[0] / "recipe.yaml"
    code, printed = two_ranks.run(
        "--config", str(recipe), f"--run-dir={profiled[0].parent / 'again'}", "--profile=12-13"
    )
    assert code == 2 and "this start takes the steps 1 to 12" in printed
    code, printed = two_ranks.run("--config", str(recipe), "--profile", "x")
    assert code == 2 and "--profile x" in printed


@pytest.mark.gpu
def test_a_gpus_profile_has_its_kernels_and_its_memory(tmp_path: Path, tiny_data: Path) -> None:
    if not torch.cuda.is_available():
        skip_or_fail("no CUDA device is here")
    values = recipe_values(tiny_data, tmp_path / "run", precision="bf16")
    recipe = write_recipe(tmp_path / "r.yaml", values)
    cuda = {"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": "0"}
    codes, output, errors = Job(recipe, "--profile", "5-6", extra=cuda).wait()
    assert codes == [0], output + errors
    folder = tmp_path / "run" / "profile" / "steps-5-6"
    assert "operation (device, its own time)" in (folder / "table.txt").read_text(encoding="utf-8")
    snapshot = pickle.loads((folder / "rank-00000.memory.pickle").read_bytes())
    assert snapshot["segments"] and any(snapshot["device_traces"])
    for record in metrics(tmp_path / "run", "train"):
        assert sum(record["parts"].values()) <= record["step_seconds"] * 1.05
        if record["mfu"] is not None:
            assert 0 < record["mfu"] < record["hfu"] < 1


def test_records_say_what_each_rank_and_each_source_did(profiled: tuple[Path, str]) -> None:
    run = profiled[0]
    records = metrics(run, "train")
    assert [record["step"] for record in records] == [1, 4, 8, 12]
    recipe = load_recipe(run / "recipe.yaml")
    count = flops_per_sequence(recipe.network, LENGTH, active=[32.0, 21.0, 10.0])
    for record in records:
        assert len(record["memory_bytes_per_rank"]) == 2
        assert all(0 < n <= p for n, p in zip(record["memory_bytes_per_rank"], record["memory_peak_bytes_per_rank"]))
        assert record["lr_groups"] == [record["lr"]] * 2
        assert record["active"] == pytest.approx([1, 21 / 32, 10 / 32])
        assert record["source_share"] == {"data": 1.0}
        ratio = record["hardware_flops_per_second"] / record["flops_per_second"]
        assert ratio == pytest.approx(count.hardware("recursion") / count.training) and ratio > 1.05
        assert record["flops_per_second"] == pytest.approx(
            record["tokens_per_second"] * count.training / LENGTH, rel=1e-6
        )
        assert record["mfu"] is None and record["hfu"] is None, "nobody promises a CPU's FLOPs"
    started = metrics(run, "event")[0]
    assert started["event"] == "started" and 0 < started["memory_bytes"] < records[-1]["memory_peak_bytes"]
    assert started["zero_stage"] == "3: weights, gradients and optimiser states are partitioned"
    assert [line.split()[:2] for line in started["partitioning"]] == [
        ["reduce_bucket_size", "5,000,000:"],
        ["stage3_prefetch_bucket_size", "5,000,000:"],
    ]


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: steps and values by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    return {name: [(event.step, event.value) for event in board.Scalars(name)] for name in board.Tags()["scalars"]}


def test_mirrors_hold_the_records(profiled: tuple[Path, str]) -> None:
    run = profiled[0]
    shown = scalars(run)
    assert shown["train/lm_loss"] == [(r["step"], pytest.approx(r["lm_loss"])) for r in metrics(run, "train")]
    assert {"validation/a/loss_causal", "train/parts/data", "train/active/1"} <= shown.keys()
    identity = (run / "wandb_id").read_text(encoding="utf-8")
    (offline,) = (run / "wandb").glob("offline-run-*")
    assert (offline / f"run-{identity}.wandb").stat().st_size > 0


def test_tensorboard_shows_every_step_once_after_kills_and_rewinds(tmp_path: Path, tiny_data: Path) -> None:
    """A run that is killed at step 6 and resumes from the checkpoint of step 4, whose validation it repeats."""
    run = RunFolder(tmp_path / "run")
    recipe = build_recipe(recipe_values(tiny_data, run.path, logging={"tensorboard": True}))

    def show(telemetry: Telemetry, steps: range, value: float) -> None:
        for step in steps:
            telemetry.record("train", {"step": step, "loss": value + step})
        telemetry.record("validation", {"step": steps[-1], "source": "a", "loss_causal": value})

    killed = Telemetry(run, recipe, 12, active=True)
    show(killed, range(1, 5), 100.0)
    killed.sync()  # the checkpoint
    show(killed, range(5, 7), 100.0)
    killed.event("spike", 6, loss=1.0)
    killed.sync()
    rewind_metrics(run, 4, ["validation"])
    resumed = Telemetry(run, recipe, 12, active=True)
    resumed.record("validation", {"step": 4, "source": "a", "loss_causal": 200.0})
    show(resumed, range(5, 8), 200.0)
    resumed.rewind(5)
    show(resumed, range(6, 9), 300.0)
    resumed.close()
    expected = [101.0, 102.0, 103.0, 104.0, 205.0, 306.0, 307.0, 308.0]
    shown = scalars(run.path)
    assert shown["train/loss"] == list(zip(range(1, 9), expected))
    assert shown["validation/a/loss_causal"] == [(4, 200.0), (8, 300.0)]
    assert shown["event/loss"] == [(6, 1.0)]
    assert [record["loss"] for record in metrics(run.path, "train")] == expected


def test_a_mirror_that_fails_is_left_behind(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb's server cannot be reached at the start, TensorBoard's disk is full after two records."""
    import torch.utils.tensorboard
    import wandb

    shown: list[int] = []

    def refuse(**settings: Any) -> None:
        raise wandb.errors.CommError("no route to api.wandb.ai")

    class FullDisk(torch.utils.tensorboard.SummaryWriter):
        def add_scalar(self, name: str, value: float, step: int) -> None:
            if step > 2:
                raise OSError(28, "No space left on device")
            shown.append(step)

    monkeypatch.setattr(wandb, "init", refuse)
    monkeypatch.setattr(torch.utils.tensorboard, "SummaryWriter", FullDisk)
    logging = {"wandb": "online", "tensorboard": True}
    recipe = build_recipe(recipe_values(tiny_data, tmp_path / "run", logging=logging))
    telemetry = Telemetry(RunFolder(tmp_path / "run"), recipe, 50, active=True)
    for step in range(1, 5):
        telemetry.record("train", {"step": step, "loss": 1.0})
    telemetry.close()
    assert shown == [1, 2] and [record["step"] for record in metrics(tmp_path / "run", "train")] == [1, 2, 3, 4]
    told = capsys.readouterr().err
    assert told.count("wandb fails (no route") == told.count("TensorBoard fails ([Errno 28] No space") == 1


def test_progress_is_quiet_away_from_a_terminal(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = build_recipe(recipe_values(tiny_data, tmp_path / "run"))
    telemetry = Telemetry(RunFolder(tmp_path / "run"), recipe, 50, active=True)
    for step in range(1, 51):
        telemetry.progress(step, 2.0, 1000.0, 0.5)
    telemetry.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2, "the first, and the last; one every half minute between them"
    assert lines[-1] == "tiny: step 50/50 · loss 2.0000 · 1,000 tokens/s · 0 s left"
