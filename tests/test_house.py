"""The walls between the rooms: who may import whom, and what importing a room costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OUR_PACKAGES = {"mor_model", "data_prep", "pretrain", "ds_configs"}
HEAVY = {"torch", "deepspeed", "transformers", "datasets", "lm_eval", "wandb", "matplotlib"}


def imported_modules(file: Path) -> set[str]:
    """Dotted names of every module a source file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return names


def imports_of(package: str, without: tuple[str, ...] = ()) -> dict[str, set[str]]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"{package} has no source files"
    return {
        str(file.relative_to(ROOT)): imported_modules(file)
        for file in files
        if not any(str(file.relative_to(ROOT)).startswith(prefix) for prefix in without)
    }


def forbidden(found: dict[str, set[str]], banned: set[str]) -> list[str]:
    return [
        f"{file} imports {name}"
        for file, names in found.items()
        for name in sorted(names)
        if name.split(".")[0] in banned
    ]


def test_the_network_knows_only_torch():
    banned = {"deepspeed", "data_prep", "pretrain", "datasets", "pydantic", "lm_eval"}
    assert not forbidden(imports_of("mor_model"), banned)
    assert not forbidden(imports_of("mor_model", without=("mor_model/hub",)), {"transformers"})


def test_data_preparation_knows_neither_torch_nor_the_other_rooms():
    assert not forbidden(imports_of("data_prep"), {"torch", "deepspeed", "mor_model", "pretrain"})


def test_the_comparison_reads_run_folders_only_through_their_files():
    assert not forbidden(imports_of("pretrain/comparison"), {"deepspeed", "torch", "lm_eval"})


def test_no_room_reaches_into_the_evaluation_or_comparison_from_below():
    for package in ("mor_model", "data_prep"):
        for file, names in imports_of(package).items():
            assert not [name for name in names if name.startswith("pretrain")], file


@pytest.mark.parametrize(
    "module",
    ["pretrain.cli.main", "mor_model.config", "mor_model.presets", "data_prep.errors", "pretrain.records.finished"],
)
def test_importing_the_command_is_cheap(module):
    code = f"import sys, {module}; print(' '.join(sorted({HEAVY!r} & set(sys.modules))))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert loaded == []
