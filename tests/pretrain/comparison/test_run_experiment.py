from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from data_prep.errors import DataError
from data_prep.reading.manifest import read_manifest
from data_prep.terminal import ProgressBars
from pretrain.comparison import experiment_data as data_room
from pretrain.comparison import run_experiment as runner
from pretrain.comparison.arms_progress import ArmsProgress
from pretrain.comparison.experiment import Experiment
from pretrain.comparison.launch import Interrupted
from pretrain.comparison.planned_runs import plan_experiment
from pretrain.errors import RecipeError, RunError
from pretrain.recipe.recipe import load_recipe
from pretrain.records.finished import Part, parts
from pretrain.records.run_folder import RunFolder
from tests.pretrain.comparison.synthetic import TINY, TINY_ARMS, change, write_corpus, write_run


class Trainer:
    """Stands in for the training command: writes what a trainer would leave, or ends with `status`, and keeps a list
    of the recipes it was called with. Evaluation commands are kept in `evaluations`.
    """

    def __init__(self, digest: str) -> None:
        self.digest = digest
        self.calls: list[str] = []
        self.evaluations: list[list[str]] = []
        self.broken: dict[str, int] = {}
        self.evaluation_status = 0
        self.finite = True

    def __call__(self, command: list[str], log: Path, tick: Callable[[], None] = lambda: None) -> int:
        if "eval" in command:
            self.evaluations.append(command[command.index("eval") + 1 :])
            return self.evaluation_status
        recipe = load_recipe(command[command.index("train") + 1])
        self.calls.append(recipe.name)
        if recipe.name in self.broken:
            log.parent.mkdir(exist_ok=True)
            log.write_text("no more memory\n")
            return self.broken[recipe.name]
        for part in parts(recipe):
            tick()
            self._write(part)
        return 0

    def _write(self, part: Part) -> None:
        recipe, folder = part.recipe, part.folder
        size = {"budget": recipe.budget.amount, "sequences": recipe.batch.sequences}
        write_run(folder.path, "any", config=recipe.network, evaluate=False, **size)
        folder.recipe_file.write_text(recipe.to_yaml())
        change(folder.plan_file, lambda plan: plan.update(data_manifest=self.digest))
        if not self.finite:  # records have null there
            text = folder.metrics_file.read_text()
            folder.metrics_file.write_text(re.sub(r'("(lm_)?loss(_causal|_topk)?": )[^,]*', r"\1null", text))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with a corpus of lines and the data set made from it."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "corpus.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        data_room.prepare_data(experiment(), Console(file=io.StringIO()))
    return folder


@pytest.fixture
def prepared(corpus, tmp_path, monkeypatch):
    """The current folder, holding that corpus and its data set."""
    shutil.copytree(corpus, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def experiment(**changes) -> Experiment:
    values = {
        "name": "small",
        "runs": "runs",
        "data": {"corpus": "corpus.jsonl", "path": "data", "vocab_size": 300, "test": 0.05},
        "launch": {"launcher": "python"},
        "base": {
            "seed": 1,
            "model": TINY,
            "budget": {"flops": 2e10},
            "batch": {"sequences": 4, "micro_batch": 4, "sequence_length": 32},
            "precision": "fp32",
        },
        "arms": TINY_ARMS,
        "evaluation": {"suites": []},
    }
    return Experiment.model_validate({**values, **changes})


@pytest.fixture
def trainer(prepared, monkeypatch) -> Trainer:
    made = Trainer(read_manifest(prepared / "data").digest())
    monkeypatch.setattr(runner, "run_child", made)
    return made


def test_data_are_prepared_once_and_other_text_is_refused(prepared, monkeypatch):
    made = read_manifest(prepared / "data")
    assert made.tokenizer.vocab_size == 300 and set(made.splits) == {"train", "validation", "test"}
    monkeypatch.setattr(data_room, "run_child", lambda *_, **__: pytest.fail("prepared again"))
    quiet = Console(file=io.StringIO())
    data_room.prepare_data(experiment(), quiet)
    other = experiment(data={"corpus": "elsewhere.jsonl", "path": "data", "vocab_size": 300})
    with pytest.raises(RecipeError, match=r"data\.corpus = .*corpus\.jsonl.*'elsewhere\.jsonl'.*name=NAME"):
        data_room.prepare_data(other, quiet)
    with pytest.raises(RecipeError, match=r"nothing: no data set there.*set data\.corpus"):
        data_room.prepare_data(experiment(data={"path": "nothing"}), quiet)
    # Refused too where another process prepares the data while this one waits for it.
    record, manifest = prepared / "data" / "prepared_from.json", prepared / "data" / "manifest.json"
    text = manifest.read_text()
    manifest.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(data_room, "locked", lambda *_: (manifest.write_text(text), contextlib.nullcontext())[1])
        with pytest.raises(RecipeError, match="name=NAME"):
            data_room.prepare_data(other, quiet)
    for damaged in ("{", "[]"):
        record.write_text(damaged)
        with pytest.raises(DataError, match="prepared_from"):
            data_room.prepare_data(experiment(), quiet)


def test_a_tokenizer_of_other_settings_is_not_taken_for_data_that_are_prepared_anew(prepared):
    for vocab_size, trained in ((300, False), (310, True)):
        shutil.rmtree(prepared / "data")
        data = {"corpus": "corpus.jsonl", "path": "data", "vocab_size": vocab_size, "test": 0.05}
        shown = io.StringIO()
        data_room.prepare_data(experiment(data=data), Console(file=shown))
        assert ("Training a tokenizer" in shown.getvalue()) == trained
        assert read_manifest(prepared / "data").tokenizer.vocab_size == vocab_size


def test_a_plan_is_of_arms_that_can_be_compared(prepared):
    vanilla, mor = plan_experiment(experiment())
    assert vanilla.network.vocab_size == mor.network.vocab_size == 300  # the tokenizer's
    assert vanilla.plan.training_flops == pytest.approx(mor.plan.training_flops, rel=0.01)
    assert vanilla.plan.tokens < mor.plan.tokens
    with pytest.raises(RecipeError, match="vocabularies of 300 and 400"):
        plan_experiment(experiment(arms={"vanilla": {}, "other": {"model": {"vocab_size": 400}}}))
    base = {"seed": 1, "model": TINY, "batch": {"sequences": 4, "micro_batch": 4, "sequence_length": 32}}
    arms = {"vanilla": {"budget": {"flops": 2e10}}, "other": {"budget": {"steps": 10}}}
    with pytest.raises(RecipeError, match="budgets in flops and in steps"):
        plan_experiment(experiment(base=base, arms=arms))
    with pytest.raises(RecipeError, match=r"arm 'vanilla': .*'optimm'.*'optim'"):
        plan_experiment(experiment(base={"model": TINY, "optimm": {}}))


def test_a_failed_arm_is_trained_again_and_what_is_done_is_not(trainer, prepared):
    trainer.broken = {"vanilla": 1}
    (failure,) = runner.run_experiment(experiment())
    assert failure.startswith("vanilla: ") and "no more memory" in failure
    assert trainer.calls == ["vanilla", "mor"]
    trainer.broken = {}
    assert runner.run_experiment(experiment()) == []
    assert trainer.calls == ["vanilla", "mor", "vanilla"]
    assert runner.run_experiment(experiment(seeds=[1, 2]), ["mor"]) == []
    assert trainer.calls == ["vanilla", "mor", "vanilla", "mor-seed2"]


def test_smaller_budgets_are_trained_by_the_process_of_the_largest(trainer, prepared):
    base = {key: value for key, value in experiment().base.items() if key != "budget"}
    made = experiment(base=base, budgets=[2e10, 4e10])
    planned = plan_experiment(made)
    assert [run.trial.name for run in planned] == ["vanilla/2e10", "mor/2e10", "vanilla", "mor"]
    trunk, branch = planned[2], planned[0]
    assert branch.plan.learning_rate.warmup == trunk.plan.learning_rate.warmup
    assert trunk.plan.branches[0].steps == branch.plan.steps
    assert branch.recipe.budget.amount == 2e10 and branch.recipe.seed == 1
    assert runner.run_experiment(made) == []
    assert trainer.calls == ["vanilla", "mor"]
    assert all(RunFolder(run.trial.folder).status()["state"] == "finished" for run in planned)


def test_a_run_of_another_recipe_or_of_other_data_is_not_taken_for_this_one(trainer, prepared):
    made = experiment()
    runner.run_experiment(made)
    base = {**made.base, "optim": {"lr": 1e-4}}
    with pytest.raises(RunError, match=r"vanilla: was begun with another recipe \(optim\.lr was 0\.003.*0\.0001"):
        runner.run_experiment(experiment(base=base))
    runner.run_experiment(experiment(base={**made.base, "logging": {"every": 1}}))
    assert trainer.calls == ["vanilla", "mor"]
    change(made.folder / "vanilla" / "plan.json", lambda plan: plan.update(data_manifest="0"))
    with pytest.raises(RunError, match="trained on other data"):
        runner.run_experiment(made)


def test_a_run_that_was_stopped_ends_the_experiment(trainer, prepared):
    made = experiment()
    runner.run_experiment(made)
    (made.folder / "vanilla" / "status.json").write_text('{"state": "stopped", "step": 3, "steps": 9}')
    trainer.broken = {"vanilla": 75}
    with pytest.raises(Interrupted):
        runner.run_experiment(made)


def test_a_result_holds_only_when_it_is_what_evaluating_now_would_give(trainer, prepared):
    """Results of other settings are not taken for these; one that fails does not stop the others."""
    made = experiment(evaluation={"suites": ["perplexity", "own", "lambada"], "limit": 7, "text_bytes": 900})
    runner.run_experiment(made, ["vanilla"])
    run = made.folder / "vanilla"
    wanted = [
        [str(run), "--suite=perplexity", "--text-bytes=900"],
        [str(run), "--suite=own", "--suite=lambada", "--limit=7", "--text-bytes=900"],
    ]
    assert trainer.evaluations == wanted
    (run / "weights").mkdir()
    (run / "weights" / "model.safetensors").touch()
    (run / "evaluation").mkdir()
    for suite, limit in (("perplexity", None), ("own", 7), ("lambada", 7)):
        settings = {"limit": limit, "text_bytes": 300}
        content = {"suite": suite, "tasks": {}, "skipped": [], "settings": settings}
        (run / "evaluation" / f"{suite}.json").write_text(json.dumps(content))
    trainer.evaluations.clear()
    trainer.evaluation_status = 2
    (failure,) = runner.run_experiment(made, ["vanilla"])
    assert trainer.evaluations == wanted and "status 2" in failure


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_trained(prepared, monkeypatch):
    (prepared / "taken").write_text("a file")
    monkeypatch.setattr(runner, "run_child", lambda *_: pytest.fail("something was started"))
    with pytest.raises(RunError, match="taken: cannot be written"):
        runner.run_experiment(experiment(runs="taken"))


def test_a_loss_that_is_not_finite_is_followed_and_said(trainer, prepared, capsys):
    made = experiment()
    trainer.finite = False
    assert runner.run_experiment(made, ["vanilla"]) == []
    shown = capsys.readouterr().err
    assert "validation loss not finite" in shown and "ended with a training loss that is not finite" in shown
    (planned,) = plan_experiment(made, ["vanilla"])
    with ProgressBars(every=0.0) as bars:
        ArmsProgress([planned], bars).follow(planned)
    assert "loss not finite" in capsys.readouterr().err


def test_the_estimate_counts_only_what_this_process_did(prepared, monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("pretrain.comparison.arms_progress.time.monotonic", lambda: now[0])
    runs = plan_experiment(experiment())
    metrics = RunFolder(runs[0].trial.folder).metrics_file
    metrics.parent.mkdir(parents=True)

    def log(share: float) -> None:
        record = {"kind": "train", "step": round(share * runs[0].plan.steps), "loss": 2.0, "tokens_per_second": 1.0}
        metrics.write_text(json.dumps(record) + "\n" + '{"kind": "train", "st')

    with ProgressBars(every=0.0) as bars:
        progress = ArmsProgress(runs, bars)
        log(0.6)  # of which nothing is this process's work
        progress.follow(runs[0])
        log(0.8)
        now[0] = 130.0
        progress.follow(runs[0])
    # A fifth of one arm took 30 s, so six fifths take 180 s.
    shown = capsys.readouterr().err
    assert "1/2 vanilla" in shown and f"step {round(0.8 * runs[0].plan.steps)} of" in shown
    assert "about 3 min left" in shown and "3 min left" not in shown.splitlines()[1]
