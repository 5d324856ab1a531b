"""A run folder's files come from outside as soon as somebody copies one: each is what it should be, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.errors import RunError
from pretrain.recipe.recipe import build_recipe
from pretrain.records.provenance import changes_since_last_start, describe_environment
from pretrain.records.run_folder import RunFolder
from pretrain.training.prepare import prepare
from tests.pretrain.support import ALONE, recipe_values

FILES = ["plan", "model", "environment", "status"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("text", ["", "[]", "3", "[" * 100_000, '{"step": ' + "9" * 5000 + "}", "\xff", '{"a": 1}}'])
def test_what_is_no_json_object_is_refused_in_a_sentence(tmp_path: Path, name: str, text: str) -> None:
    run = RunFolder(tmp_path)
    (tmp_path / f"{name}.json").write_text(text, encoding="latin-1")
    with pytest.raises(RunError, match=rf"{name}\.json"):
        getattr(run, name)()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("status", {"state": ["finished"]}),
        ("status", {"state": "running", "step": "5"}),
        ("status", {"state": "running", "steps": None}),
        ("status", {"state": "failed", "reason": {"x": 1}}),
        ("plan", {"steps": 1.5}),
        ("plan", {"tokenizer_fingerprint": 5}),
        ("environment", {"versions": ["torch"]}),
        ("environment", {"world_size": True}),
        ("environment", {"code": None}),
    ],
)
def test_values_of_other_kinds_are_refused_in_a_sentence(tmp_path: Path, name: str, content: dict[str, Any]) -> None:
    (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(RunError, match=rf"{name}\.json: {list(content)[-1]} is .*, not .* new folder"):
        getattr(RunFolder(tmp_path), name)()


@pytest.mark.parametrize("line", ["[" * 100_000, "9" * 5000, "null", "\x80"])
def test_a_line_of_the_records_that_is_none_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n' + line + "\n", encoding="latin-1")
    with pytest.raises(RunError, match=r"metrics\.jsonl:2: not a JSON object"):
        list(RunFolder(tmp_path).metrics())


def test_another_machines_record_of_its_environment_is_compared_and_never_obeyed(
    tmp_path: Path, tiny_data: Path
) -> None:
    prepared = prepare(build_recipe(recipe_values(tiny_data, tmp_path / "run")), ALONE)
    run, device = RunFolder(tmp_path / "run"), torch.device("cpu")
    run.path.mkdir()
    facts = describe_environment(prepared.recipe, prepared.ds_config, ALONE, device)
    for content in ({}, {"versions": {}}, {"versions": 3}, {"code": None}, []):
        run.write_json(run.environment_file, content)
        assert changes_since_last_start(run, facts) == []
    run.write_json(run.environment_file, {**facts, "device": "\x1b[31m" + "x" * 5000})
    (told,) = changes_since_last_start(run, facts)
    assert "the device was" in told and "\x1b" not in told and len(told) < 1000
