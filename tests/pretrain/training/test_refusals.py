"""What cannot be trained is said in one sentence before training."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import DataError
from mor_model.errors import ConfigError
from pretrain.errors import RunError, UserError
from pretrain.ranks.agreement import find_disagreement, on_first_rank
from pretrain.recipe.recipe import build_recipe
from pretrain.records import provenance
from pretrain.records.provenance import identity
from pretrain.training.prepare import Prepared, prepare
from tests.pretrain.collectives import Threads
from tests.pretrain.support import (
    ALONE,
    ROOT,
    Job,
    Workers,
    environment,
    make_dataset,
    recipe_values,
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
    refused(one_rank, tmp_path, {**values, "precision": "fp16"}, "fp16 requires a GPU")


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


@pytest.mark.parametrize("kind", [UserError, DataError, ConfigError, OSError])
def test_what_goes_wrong_on_the_first_rank_alone_is_told_on_all(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def fail() -> None:
        raise kind("the reason")

    outcomes = Threads(2, monkeypatch).each(lambda rank: on_first_rank(fail))
    assert [(type(error), str(error)) for error in outcomes] == [(RunError, "the reason")] * 2


def test_ranks_compare_everything_that_decides_a_run(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thing after the other changed on one rank; `require_agreement` compares by these names."""
    values = recipe_values(tiny_data, tmp_path / "run")
    prepared = prepare(build_recipe(values), ALONE)

    def of(it: Prepared) -> dict[str, str]:
        return identity(it.recipe, it.ds_config, it.data.manifest, it.data.fingerprint)

    usual = of(prepared)

    def differing(changed: Prepared) -> set[str]:
        other = of(changed)
        message = find_disagreement([usual, other, usual])
        assert message is not None and "rank 1 has" in message
        return {name for name in usual if usual[name] != other[name]}

    assert differing(prepare(build_recipe({**values, "optim": {"lr": 0.02}}), ALONE)) == {"recipe"}
    assert differing(prepare(build_recipe({**values, "seed": 8}), ALONE)) == {"recipe", "seed"}
    data = dataclasses.replace(prepared.data, manifest="0" * 64, fingerprint="1" * 64)
    assert differing(dataclasses.replace(prepared, data=data)) == {"data", "tokenizer"}
    other = dataclasses.replace(prepared.stage, ds_config={**prepared.ds_config, "zero_optimization": {"stage": 2}})
    assert differing(dataclasses.replace(prepared, stage=other)) == {"DeepSpeed configuration"}
    copy = tmp_path / "copy"
    for package in ("pretrain", "mor_model", "data_prep"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "__file__", str(copy / "pretrain" / "records" / "provenance.py"))
    assert of(prepared) == usual, "where the code lies does not matter"
    (copy / "mor_model" / "loss.py").open("a").write("# patched on one node\n")
    assert differing(prepared) == {"code"}
    monkeypatch.undo()
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.6" if name == "torch" else version(name))
    assert differing(prepared) == {"version of torch"}
