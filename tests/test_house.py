"""The walls between the rooms: who may import whom, that nothing goes round in a circle, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mor_model", "data_prep", "pretrain", "ds_configs")
HEAVY = {"torch", "deepspeed", "transformers", "datasets", "lm_eval", "wandb", "matplotlib"}

# A room may import those of the floors below it.
FLOORS = {
    "data_prep": [
        {"data_prep"},
        {"data_prep/sources", "data_prep/tokenizers"},
        {"data_prep/reading"},
        {"data_prep/tokenizing", "data_prep/corpora", "data_prep/interchange"},
        {"data_prep/commands"},
        {"data_prep/cli.py"},
        {"data_prep/__main__.py"},
    ],
    "pretrain": [
        {"pretrain/errors.py"},
        {"pretrain/recipe", "pretrain/ranks"},
        {"pretrain/records"},
        {"pretrain/checkpoints"},
        {"pretrain/evaluation"},
        {"pretrain/training"},
        {"pretrain/train.py"},
        {"pretrain/comparison"},
        {"pretrain/comparison/report"},
        {"pretrain/cluster"},
        {"pretrain/cli"},
    ],
    "mor_model": [{"mor_model"}, {"mor_model/hub"}],
}
ROOMS = {name for floors in FLOORS.values() for floor in floors for name in floor}
# Files that have the name of another one are the same thing in two packages.
SAME_THING = {"__init__.py", "__main__.py", "errors.py", "base.py", "export.py"}


@cache
def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            found[".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = file
    return found


def imported(file: Path) -> set[str]:
    """Dotted names of every module that a source file imports, also inside functions and for types alone."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = whole & modules().keys()
            names.update(submodules)
            if len(submodules) < len(whole):
                names.add(node.module)
    return names


@cache
def graph() -> dict[str, set[str]]:
    """Our modules that each of our modules imports."""
    return {name: (imported(file) & modules().keys()) - {name} for name, file in modules().items()}


def room(module: str) -> str:
    """The folder a module lies in; the modules of the top floor are rooms of their own."""
    file = modules()[module].relative_to(ROOT)
    return str(file) if str(file) in ROOMS else str(file.parent)


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """Nodes from which the arrows lead back to themselves."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            for name in arrows.get(ahead.pop(), set()) - seen:
                seen.add(name)
                ahead.append(name)
        return seen

    return [name for name in arrows if name in reached(name)]


def test_no_module_imports_itself_by_a_detour():
    assert circles(graph()) == []


def test_no_room_imports_itself_by_a_detour():
    arrows = defaultdict(set)
    for module, names in graph().items():
        arrows[room(module)] |= {room(name) for name in names} - {room(module)}
    assert circles(arrows) == []


@pytest.mark.parametrize("package", FLOORS)
def test_arrows_between_rooms_lead_down(package: str):
    floors = {name: number for number, floor in enumerate(FLOORS[package]) for name in floor}
    for module, names in graph().items():
        if not module.startswith(package) or module == package:
            continue
        assert room(module) in floors, f"{module}: {room(module)} has no place in FLOORS"
        for name in names:
            if name.startswith(package) and room(name) != room(module):
                assert floors[room(name)] < floors[room(module)], f"{module} imports {name}, which is not below it"


def test_a_room_can_be_drawn_on_a_whiteboard():
    rooms = {room(module) for module in modules() if module.startswith("pretrain")}
    assert len({name for name in rooms if not name.endswith(".py")} - {"pretrain"}) <= 12


def test_no_two_files_share_a_name_unless_they_are_the_same_thing():
    places = defaultdict(list)
    for module, file in modules().items():
        if file.name not in SAME_THING and "cli" not in file.parts and "commands" not in file.parts:
            places[file.name].append(module)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_no_package_passes_on_what_others_define():
    for module, file in modules().items():
        if file.name == "__init__.py" and module != "mor_model":  # its names are the public interface, loaded on demand
            assert not any(name in modules() for name in imported(file)), f"{file} re-exports"


def forbidden(package: str, banned: set[str], without: str = "") -> list[str]:
    return [
        f"{module} imports {name}"
        for module, file in modules().items()
        if module.startswith(package) and not (without and module.startswith(without))
        for name in sorted(imported(file))
        if name.split(".")[0] in banned
    ]


def test_the_network_knows_only_torch():
    assert not forbidden("mor_model", {"deepspeed", "data_prep", "pretrain", "datasets", "pydantic", "lm_eval"})
    assert not forbidden("mor_model", {"transformers"}, without="mor_model.hub")


def test_data_preparation_knows_neither_torch_nor_the_other_packages():
    assert not forbidden("data_prep", {"torch", "deepspeed", "mor_model", "pretrain"})


def test_the_comparison_reads_run_folders_only_through_their_files():
    assert not forbidden("pretrain.comparison", {"deepspeed", "torch", "lm_eval"})
    for module, names in graph().items():
        if module.startswith("pretrain.comparison"):
            assert not [name for name in names if room(name) in ("pretrain/training", "pretrain/checkpoints")], module


@pytest.mark.parametrize(
    "module",
    ["pretrain.cli.main", "mor_model.config", "mor_model.presets", "data_prep.errors", "pretrain.records.finished"],
)
def test_importing_the_command_is_cheap(module: str):
    code = f"import sys, {module}; print(' '.join(sorted({HEAVY!r} & set(sys.modules))))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert loaded == []
