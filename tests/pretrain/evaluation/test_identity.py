"""A stored result is read again only when evaluating now would make the same one."""

from __future__ import annotations

import json
import shutil

import pytest

from mor_model.weights import load_model, save_weights
from pretrain.evaluation import identity
from pretrain.evaluation.evaluate import evaluate_run
from pretrain.evaluation.identity import is_current, stored_result
from pretrain.evaluation.settings import Settings, result_file
from pretrain.records.run_folder import RunFolder
from tests.pretrain.evaluation.runs import make_run, write_held_out
from tests.pretrain.evaluation.test_own_suite import prose

SETTINGS = Settings(limit=2, text_bytes=2000)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> RunFolder:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MOR_SHARED_DATA", raising=False)
        run = make_run(tmp_path_factory.mktemp("identity") / "run", [prose(seed, 36) for seed in range(5)])
        evaluate_run(run, ["perplexity", "own", "routing"], settings=SETTINGS)
    return run


@pytest.fixture
def run(evaluated, tmp_path) -> RunFolder:
    """A copy, to be changed."""
    shutil.copytree(evaluated.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def current(run: RunFolder, settings: Settings = SETTINGS, **where) -> dict[str, bool]:
    suites = ("perplexity", "own", "routing")
    return {suite: stored_result(run, suite, settings, **where) is not None for suite in suites}


def test_each_setting_counts_where_it_changes_the_numbers(run):
    assert all(current(run).values())
    assert not is_current(run, "perplexity", Settings(limit=2, text_bytes=2000, routing="topk"))
    assert current(run, Settings(limit=2, text_bytes=6000)) == {"perplexity": False, "own": True, "routing": False}
    assert current(run, Settings(limit=3, text_bytes=2000)) == {"perplexity": False, "own": False, "routing": True}


def test_other_weights_text_network_or_code_are_another_result(run, tmp_path, monkeypatch):
    moved = write_held_out(tmp_path / "moved", [prose(77)])
    assert not any(current(run, data=moved).values())
    model = load_model(run.weights)
    state = {name: value + 1e-3 for name, value in model.state_dict().items()}
    before = run.weights.rename(tmp_path / "before")
    save_weights(run.weights, state, model.config)
    assert not any(current(run).values())
    shutil.rmtree(run.weights)
    before.rename(run.weights)
    assert all(current(run).values())
    description = json.loads((run.weights / "model.json").read_text())
    (run.weights / "model.json").write_text(json.dumps({**description, "norm_eps": 1e-3}))
    assert not any(current(run).values())
    (run.weights / "model.json").write_text(json.dumps(description, indent=2) + "\n")
    assert all(current(run).values())
    monkeypatch.setattr(identity, "_code", lambda: "newer")
    assert not any(current(run).values())


@pytest.mark.parametrize("damage", ["{", "[]", "null", '{"identity": 1}', "", "a figure changed by hand"])
def test_a_damaged_result_is_made_again(run, damage):
    file = result_file(run, "perplexity", SETTINGS)
    whole = json.loads(file.read_text())
    if damage.startswith("a figure"):
        damage = json.dumps({**whole, "primary": {**whole["primary"], "value": 0.5}})
    file.write_text(damage)
    again = evaluate_run(run, ["perplexity"], settings=SETTINGS)["perplexity"]
    stored = json.loads(file.read_text())
    for name in ("tasks", "primary"):
        assert again[name] == stored[name] == whole[name]


def questions(folder, count: int):
    folder.mkdir(parents=True, exist_ok=True)
    record = {"sentence": "a _ b c", "option1": "x", "option2": "y", "answer": "1"}
    (folder / "winogrande.validation.jsonl").write_text(
        "".join(json.dumps({**record, "option2": "y" * (n + 1)}) + "\n" for n in range(count))
    )


def test_a_benchmark_is_made_of_its_questions(run, tmp_path, monkeypatch):
    settings, shared = Settings(limit=2), tmp_path / "shared"
    monkeypatch.delenv("MOR_SHARED_DATA", raising=False)
    skipped = evaluate_run(run, ["winogrande"], settings=settings)["winogrande"]
    assert skipped["skipped"] and is_current(run, "winogrande", settings)
    questions(shared / "eval", 3)
    monkeypatch.setenv("MOR_SHARED_DATA", str(shared))
    assert not is_current(run, "winogrande", settings), "what was skipped has come within reach"
    first = evaluate_run(run, ["winogrande"], settings=settings)["winogrande"]
    assert not first["skipped"] and is_current(run, "winogrande", settings)
    monkeypatch.delenv("MOR_SHARED_DATA")
    assert evaluate_run(run, ["winogrande"], settings=settings)["winogrande"] == first, "kept where they are away"
    monkeypatch.setenv("MOR_SHARED_DATA", str(shared))
    questions(shared / "eval", 4)
    assert not is_current(run, "winogrande", settings)
    monkeypatch.setattr("mor_model.weights.load_model", lambda *_, **__: pytest.fail("evaluated again"))
    questions(shared / "eval", 3)
    assert evaluate_run(run, ["winogrande"], settings=settings)["winogrande"] == first
