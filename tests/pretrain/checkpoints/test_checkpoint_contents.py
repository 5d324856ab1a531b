"""What lies in a checkpoint folder is read and never run, and what was changed is found."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.checkpoint.universal_checkpoint import load_hp_checkpoint_state
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from pretrain.checkpoints.branches import seed_branch
from pretrain.checkpoints.checkpoint_manifest import read_manifest
from pretrain.checkpoints.convert import to_universal, to_weights
from pretrain.checkpoints.restricted_loading import load_restricted, restricted_loading
from pretrain.checkpoints.store import find_damage, list_checkpoints
from pretrain.errors import RunError
from pretrain.records.run_folder import RunFolder
from tests.pretrain.payloads import Payload, fake_checkpoint, forge, plant, rewrite_manifest
from tests.pretrain.support import Workers, recipe_values, write_recipe

STAGES = ("zero0", "zero1", "zero2", "zero3")
# Every file that DeepSpeed writes or reads, by stage and the end of its name.
WRITTEN = [
    ("zero0", "model_states.pt"),
    *((stage, kind) for stage in STAGES[1:] for kind in ("model_states.pt", "optim_states.pt")),
]
QUICK = [("zero1", "optim_states.pt"), ("zero3", "model_states.pt")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, one_rank: Workers) -> Path:
    """A stopped run of every ZeRO stage, and the recipe of each."""
    folder = tmp_path_factory.mktemp("runs")
    for stage in STAGES:
        values = recipe_values(
            tiny_data,
            folder / stage,
            deepspeed={"config": stage},
            precision="bf16" if stage == "zero1" else "fp32",
            evaluation={"every": 0},
        )
        (folder / stage).mkdir()
        (folder / stage / "stop").touch()
        code, printed = one_rank.run("--config", str(write_recipe(folder / f"{stage}.yaml", values)))
        assert code == 76, printed
    return folder


@pytest.fixture
def planted(runs: Path, tmp_path: Path) -> Iterator[Any]:
    """Call with a stage and a kind of file: a copy of that run's checkpoint whose file of that kind holds a payload;
    its checksums are right. In the end the payload must not have been run.
    """
    marker = tmp_path / "was-run"

    def make(stage: str, kind: str) -> Path:
        shutil.copytree(runs / stage, tmp_path / "run")
        (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
        plant(next(checkpoint.glob(f"*{kind}")), marker)
        rewrite_manifest(checkpoint)
        assert find_damage(checkpoint) is None
        return checkpoint

    yield make
    assert not marker.exists()


@pytest.mark.parametrize(("stage", "kind"), WRITTEN)
def test_resuming_runs_nothing_that_lies_in_a_checkpoint(
    planted: Any, runs: Path, one_rank: Workers, stage: str, kind: str
) -> None:
    checkpoint = planted(stage, kind)
    code, printed = one_rank.run("--config", str(runs / f"{stage}.yaml"), f"run_dir={checkpoint.parents[1]}")
    assert code == 2 and "Traceback" not in printed, printed
    assert kind in printed and "names" in printed and "mkdir" in printed and str(checkpoint) in printed


@pytest.mark.parametrize(
    ("stage", "kind"),
    [pytest.param(*one, marks=[] if one in QUICK else [pytest.mark.slow]) for one in WRITTEN[1:]],
)
def test_converting_runs_nothing_either(planted: Any, stage: str, kind: str) -> None:
    """Were a file exchanged after it was checked."""
    checkpoint = planted(stage, kind)
    with pytest.raises(RunError, match=r"names \w+\.mkdir"):
        to_universal(checkpoint)
    assert not (checkpoint.parent / f".{checkpoint.name}.universal").exists()
    with pytest.raises(RunError, match=r"names \w+\.mkdir"):
        to_weights(checkpoint, int(stage[-1]))


def test_what_is_made_of_a_checkpoint_is_written_beside_it_and_nowhere_else(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where links wait under the names that are written to; and by this code, whatever the working directory
    holds.
    """
    shutil.copytree(runs / "zero1", tmp_path / "run")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("mine", encoding="utf-8")
    for ending in ("universal", "converting", "weights"):
        (checkpoint.parent / f".{checkpoint.name}.{ending}").symlink_to(elsewhere)
    (checkpoint.parent / "latest_universal").symlink_to(elsewhere / "file")
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "__init__.py").write_text("raise SystemExit('a stranger was run')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    universal, weights = to_universal(checkpoint.relative_to(tmp_path)), to_weights(checkpoint, 1)
    assert (universal / "zero" / "optimizer_state.pt").is_file() and (weights / "model.safetensors").is_file()
    assert [file.name for file in elsewhere.iterdir()] == ["file"]
    assert (elsewhere / "file").read_text(encoding="utf-8") == "mine"


def test_a_branch_takes_a_link_along_and_not_what_it_leads_to(tmp_path: Path) -> None:
    trunk, branch = RunFolder(tmp_path / "trunk"), RunFolder(tmp_path / "branch")
    checkpoint = fake_checkpoint(trunk.checkpoints, 4)
    trunk.metrics_file.touch()
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "file").touch()
    (checkpoint / "link").symlink_to(tmp_path / "all")
    seed_branch(trunk, branch, 4)
    assert (branch.checkpoints / checkpoint.name / "a.pt").is_file()
    assert (branch.checkpoints / checkpoint.name / "link").is_symlink()


@pytest.mark.parametrize(("stage", "kind"), WRITTEN)
def test_reading_one_file_runs_nothing(planted: Any, stage: str, kind: str) -> None:
    file = next(planted(stage, kind).glob(f"*{kind}"))
    with pytest.raises(RunError, match=rf"{kind}: names \w+\.mkdir"):
        load_restricted(file, map_location="cpu")


def read_globals_of_stages_1_and_2(folder: Path) -> None:
    ZeROOptimizer.load_hp_checkpoint_state_from_checkpoint_dir(SimpleNamespace(), "", str(folder))


def read_parameter_of_stages_1_and_2(folder: Path) -> None:
    load_hp_checkpoint_state(SimpleNamespace(_hp_mapping=SimpleNamespace()), str(folder / "zero" / "p"), 0, 1)


def read_globals_of_stage_3(folder: Path) -> None:
    DeepSpeedZeroOptimizer_Stage3.load_hp_checkpoint_state_from_checkpoint_dir_stage3(SimpleNamespace(), str(folder))


def read_parameter_of_stage_3(folder: Path) -> None:
    stub = SimpleNamespace(dp_process_group=None)
    for file in (folder / "zero" / "p").iterdir():
        DeepSpeedZeroOptimizer_Stage3.load_hp_checkpoint_state(stub, str(file.parent), file.stem)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        *(("optimizer_state", read) for read in (read_globals_of_stages_1_and_2, read_globals_of_stage_3)),
        *((f"p/{key}", read_parameter_of_stages_1_and_2) for key in ("fp32", "exp_avg", "exp_avg_sq", "step")),
        *((f"p/{key}", read_parameter_of_stage_3) for key in ("fp32", "exp_avg", "exp_avg_sq")),
    ],
)
def test_deepspeeds_universal_loader_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, read: Callable[[Path], None]
) -> None:
    """The files that only a converted checkpoint has, were they exchanged between conversion and loading."""
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda group=None: 0)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # what some set for other files' sake
    (tmp_path / "zero" / "p").mkdir(parents=True)
    torch.save({"param": Payload(tmp_path / "was-run")}, tmp_path / "zero" / f"{name}.pt")
    with pytest.raises(RunError, match=r"names \w+\.mkdir"), restricted_loading(tmp_path):
        read(tmp_path)
    assert not (tmp_path / "was-run").exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1" and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_what_training_in_half_precision_writes_is_read(tmp_path: Path) -> None:
    """A dynamic loss scale, which only GPUs train with."""
    scaler = DynamicLossScaler(2.0**12, 2.0, 500, 1.0, 3, True, dtype=torch.half)
    scaler.cur_iter = 41
    torch.save({"loss_scaler": scaler}, tmp_path / "a.pt")
    found = load_restricted(tmp_path / "a.pt")["loss_scaler"]
    assert type(found) is DynamicLossScaler and vars(found) == vars(scaler)


@pytest.mark.parametrize(
    "content", [b"", b"not a pickle", b"\x80\x02cposix\nmkdir\nq\x00.", b"PK\x03\x04" + b"\x00" * 60]
)
def test_files_that_torch_has_not_written_are_refused_in_a_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(RunError, match=r"a\.pt: (is not a file|names)"):
        load_restricted(tmp_path / "a.pt")


def set_in(place: str, value: Any) -> Any:
    def change(content: dict[str, Any]) -> None:
        *path, last = place.split("/")
        for key in path:
            content = content[key]
        content[last] = value

    return change


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("state/position", 0),
        ("state/step", 5),
        ("state/skipped", [[3, 5]]),
        ("state/flops", 1e9),
        ("world_size", 2),
        ("checksum", None),
        ("files/a.pt/sha256", "0" * 64),
        ("new", 1),
    ],
)
def test_a_changed_checkpoint_json_is_found(tmp_path: Path, place: str, value: Any) -> None:
    checkpoint = fake_checkpoint(tmp_path, 4)
    file = checkpoint / "checkpoint.json"
    assert find_damage(checkpoint) is None
    content = json.loads(file.read_text(encoding="utf-8"))
    set_in(place, value)(content)
    file.write_text(json.dumps(content), encoding="utf-8")
    assert "does not match its own checksum" in str(find_damage(checkpoint))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("position", -1),
        ("position", "8"),
        ("position", 8.0),
        ("position", True),
        ("position", None),
        ("skipped", [[5, 3]]),
        ("skipped", [[1, 2, 3]]),
        ("skipped", 4),
        ("best_validation", [1.0]),
        ("recent_losses", {"x": 1}),
        ("unfinished", [None]),
        ("surplus", 1),
        ("step", 5),
    ],
)
def test_a_malformed_one_is_damaged_even_with_the_right_checksum(tmp_path: Path, name: str, value: Any) -> None:
    checkpoint = fake_checkpoint(tmp_path, 4)
    rewrite_manifest(checkpoint, **{name: value})
    assert "checkpoint.json" in str(find_damage(checkpoint))
    with pytest.raises(RunError, match=r"checkpoint\.json"):
        read_manifest(checkpoint)


@pytest.mark.parametrize(
    "text", ["", "null", "[1, 2]", "[" * 100_000, '{"checksum": ' + "9" * 5000 + "}", '"\\ud800"', "\xff", '{"x": NaN}']
)
def test_what_is_no_checkpoint_json_is_damaged(tmp_path: Path, text: str) -> None:
    checkpoint = fake_checkpoint(tmp_path, 4)
    (checkpoint / "checkpoint.json").write_text(text, encoding="latin-1")
    assert "checkpoint.json" in str(find_damage(checkpoint))


def test_a_file_that_is_not_on_the_list_is_no_part_of_a_checkpoint(tmp_path: Path) -> None:
    """DeepSpeed and its converter find files by patterns of names."""
    checkpoint = fake_checkpoint(tmp_path, 4)
    (checkpoint / "notes.txt").touch()
    assert find_damage(checkpoint) is None
    (checkpoint / "a_mp_rank_00_model_states.pt").touch()
    assert "a_mp_rank_00_model_states.pt" in str(find_damage(checkpoint))


@pytest.mark.parametrize("name", ["../a.pt", "/etc/passwd", "", ".", "b/../a.pt", "a.pt\n"])
def test_a_file_on_the_list_lies_in_the_checkpoint(tmp_path: Path, name: str) -> None:
    checkpoint = fake_checkpoint(tmp_path, 4)
    shutil.copy(checkpoint / "a.pt", tmp_path)
    content = json.loads((checkpoint / "checkpoint.json").read_text(encoding="utf-8"))
    forge(checkpoint, {**content, "files": {name: content["files"]["a.pt"]}})
    assert "checkpoint.json" in str(find_damage(checkpoint))


def test_only_names_that_a_run_gives_are_checkpoints(tmp_path: Path) -> None:
    fake_checkpoint(tmp_path, 4)
    for name in ("step-000000004", "step-٠٠٠٠٠٠٠٥", "step-4", "step-00000006x", "step-" + "9" * 60):
        shutil.copytree(tmp_path / "step-00000004", tmp_path / name)
    assert list_checkpoints(tmp_path) == [(4, "step-00000004")]
