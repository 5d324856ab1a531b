"""Suites while training: the figures of `mor eval`, on all ranks, without changing the run; their cost and its cap."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_prep.tokenizers.loading import load_tokenizer
from pretrain.checkpoints.store import TrainState
from pretrain.errors import RecipeError, RunError, UserError
from pretrain.evaluation.evaluate import evaluate_run
from pretrain.evaluation.settings import Settings
from pretrain.ranks.lockstep import Lockstep
from pretrain.ranks.signals import Asked
from pretrain.recipe.recipe import Recipe, build_recipe
from pretrain.recipe.sections import Suites
from pretrain.records.run_folder import RunFolder
from pretrain.training.evaluate_in_training import EvaluationHooks, SuiteRunner, check_suites_of, held_out_texts
from tests.pretrain.support import LENGTH, Workers, losses, metrics, recipe_values, tiny_model

SUITES = ["perplexity", "own", "routing"]
# Weights are partitioned however small they are, so every forward pass is a collective.
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


def values_of(data: Path, run: Path, **evaluation: Any) -> dict[str, Any]:
    vocabulary = load_tokenizer(data / "tokenizer").vocab_size
    return recipe_values(
        data,
        run,
        model=tiny_model(vocab_size=vocabulary),
        budget={"steps": 8},
        evaluation={"every": 0, "sequences": 2, **evaluation},
    )


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, prose_data: Path, two_ranks: Workers) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "zero3.json").write_text(json.dumps(ZERO3), encoding="utf-8")
    values = values_of(prose_data, folder / "run", suites={"names": SUITES, "every": 4, "limit": 5})
    return two_ranks.train(folder, values | {"deepspeed": {"config": str(folder / "zero3.json")}})


def test_suites_during_training_are_what_evaluating_the_weights_gives(
    tmp_path: Path, prose_data: Path, evaluated: Path, two_ranks: Workers
) -> None:
    records = metrics(evaluated, "evaluation")
    assert [(r["step"], r["suite"]) for r in records] == [(step, suite) for step in (4, 8) for suite in SUITES]
    # What lies beside the steps' folders are results of the final weights, which reports read.
    assert not list((evaluated / "evaluation").glob("*.json"))
    final = evaluate_run(RunFolder(evaluated), SUITES, settings=Settings(limit=5))
    for record in records[3:]:
        suite, task = record["suite"], final[record["suite"]]["tasks"][record["suite"]]
        file = evaluated / "evaluation" / "step-00000008" / f"{suite}.json"
        stored = json.loads(file.read_text(encoding="utf-8"))
        assert stored["tasks"][suite]["metrics"] == pytest.approx(task["metrics"], rel=1e-4, abs=1e-5)
        assert stored["step"] == 8 and stored["tokens"] == record["tokens"] == 8 * 8 * LENGTH
        assert record["metrics"] == stored["tasks"][suite]["metrics"] and record["n"] == task["n"]
        assert record["value"] == record["metrics"][record["metric"]] and record["routing"] == task["routing"]
        assert record["seconds"] > 0 and 0 < record["evaluation_share"] < 1
    assert records[3]["value"] < records[0]["value"], "it learns"
    values = values_of(prose_data, tmp_path / "plain")
    plain = two_ranks.train(tmp_path, values | {"deepspeed": {"config": str(evaluated.parent / "zero3.json")}})
    assert losses(plain) == losses(evaluated), "evaluating changes nothing"


@pytest.mark.slow
def test_benchmarks_run_in_the_loop(tmp_path: Path, prose_data: Path, two_ranks: Workers, shared_data: Path) -> None:
    suites = {"names": ["wikitext", "lambada", "hellaswag"], "every": 8, "limit": 3}
    run = two_ranks.train(tmp_path, values_of(prose_data, tmp_path / "run", suites=suites))
    records = {record["suite"]: record for record in metrics(run, "evaluation")}
    assert records.keys() == set(suites["names"])
    final = evaluate_run(RunFolder(run), suites["names"], settings=Settings(limit=3))
    for suite, record in records.items():
        assert record["n"] == 3 and record["metrics"] == pytest.approx(
            final[suite]["tasks"][suite]["metrics"], rel=1e-4
        )
    assert {"word_perplexity", "bits_per_byte", "token_perplexity"} <= records["wikitext"]["metrics"].keys()


def test_results_that_cannot_be_written_do_not_end_the_run(
    tmp_path: Path, prose_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    telemetry = SimpleNamespace(say=told.append, event=lambda event, step, **values: told.append(event))
    runner = SuiteRunner(
        SimpleNamespace(module=None),
        Suites(names=("own",)),
        folder=RunFolder(tmp_path),
        telemetry=telemetry,  # type: ignore[arg-type]
        tokenizer=prose_data / "tokenizer",
        texts=[],
        device=torch.device("cpu"),
        lockstep=Lockstep(),
    )
    result = {"tasks": {}, "primary": None, "skipped": [], "seconds": 1.0}
    monkeypatch.setattr("pretrain.evaluation.evaluate.evaluate_model", lambda *_, **__: {"own": result})
    (tmp_path / "evaluation").write_text("no folder can be made here", encoding="utf-8")
    ((kind, record),) = runner.run(TrainState(step=4), lambda doing: None)
    assert (kind, record["suite"]) == ("evaluation", "own")
    assert told[0] == "results_not_written" and "step-00000004: not written" in told[1]


def eight_steps(cap: float | None) -> tuple[list[tuple[str, int, float]], TrainState]:
    """What is recorded, and the last state, where every step takes a second and its validation another."""
    now, told = SimpleNamespace(time=0.0), []

    def measure() -> list[dict[str, Any]]:
        now.time += 1.0
        return [{"source": "a", "loss_causal": 10.0 - now.time, "loss_topk": 0.0}]

    telemetry = SimpleNamespace(
        record=lambda kind, values: told.append((kind, values["step"], values["evaluation_share"])),
        event=lambda event, step, **values: told.append((event, step, values["share"])),
        say=lambda text: None,
    )
    hooks = EvaluationHooks(
        plan=SimpleNamespace(steps=8, evaluate_every=1, suites_every=0),  # type: ignore[arg-type]
        max_share=cap,
        validator=SimpleNamespace(run=measure),  # type: ignore[arg-type]
        suites=None,
        telemetry=telemetry,  # type: ignore[arg-type]
        beat=lambda doing: None,
        lockstep=SimpleNamespace(run=lambda action: action()),  # type: ignore[arg-type]
        clock=lambda: now.time,
    )
    for step in range(1, 9):
        now.time += 1.0
        state = TrainState(step=step)
        assert hooks.run(state, Asked()) == Asked()
    return told, state


def test_the_cap_holds_except_at_the_end() -> None:
    told, _ = eight_steps(cap=0.29)
    # The first is not known beforehand; then 2 of 4 s, 2 of 5 and 2 of 6 would be too much, 2 of 7 is not.
    assert [step for kind, step, _ in told if kind == "validation"] == [1, 5, 8]
    assert [step for kind, step, _ in told if kind == "evaluation_skipped"] == [2, 3, 4, 6, 7]
    shares = [1 / 2, 2 / 4, 2 / 5, 2 / 6, 2 / 7, 3 / 9, 3 / 10, 3 / 11]
    assert [share for _, _, share in told] == pytest.approx(shares)
    told, state = eight_steps(cap=None)
    assert [kind for kind, _, _ in told] == ["validation"] * 8
    assert state.best_validation == (10.0 - 16.0, 8)


def test_suites_that_cannot_run_are_refused_before_training(
    tmp_path: Path, prose_data: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recipe(data: Path, *names: str) -> Recipe:
        return build_recipe(recipe_values(data, tmp_path / "run", evaluation={"suites": {"names": [*names]}}))

    def check(data: Path, *names: str) -> None:
        check_suites_of(recipe(data, *names))

    check(prose_data, "perplexity")
    for names in ("perplexity", "all"):
        assert held_out_texts(recipe(prose_data, names)) == [prose_data / "held_out" / "test.jsonl.zst"]
    with pytest.raises(RunError, match=r"test\.jsonl\.zst: missing"):
        check(tiny_data, "perplexity")
    with pytest.raises(UserError, match="did you mean 'wikitext'"):
        check(prose_data, "wikitxt")
    monkeypatch.delenv("MOR_SHARED_DATA", raising=False)
    with pytest.raises(RecipeError, match="hellaswag has no questions"):
        check(prose_data, "hellaswag")
    with pytest.raises(RecipeError, match=r"evaluation\.suites\.names"):
        check(prose_data)
