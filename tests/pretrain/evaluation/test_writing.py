"""What was computed is not lost: places are tried first, and a result that cannot be written is shown all the same."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from mor_model.hub.llama import is_llama
from mor_model.weights import load_model
from pretrain.errors import RunError
from pretrain.evaluation import evaluate
from pretrain.evaluation.evaluate import Incomplete, evaluate_run
from pretrain.evaluation.settings import Settings
from pretrain.records.run_folder import RunFolder
from tests.pretrain.evaluation.runs import make_run, mor
from tests.pretrain.evaluation.test_identity import questions
from tests.pretrain.evaluation.test_own_suite import prose


@pytest.fixture
def run(tmp_path, monkeypatch) -> RunFolder:
    monkeypatch.delenv("MOR_SHARED_DATA", raising=False)
    return make_run(tmp_path / "run", [prose(1, 12)])


def fill_the_disk(monkeypatch, folder: Path, *names: str) -> None:
    """Files below `folder` whose names begin so can no longer be made."""
    replace = os.replace

    def full(source, target, **options):
        if folder in Path(target).parents and Path(target).name.startswith(names):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace(source, target, **options)

    monkeypatch.setattr("os.replace", full)


def test_a_place_that_cannot_be_written_is_found_before_anything_is_computed(run, monkeypatch):
    run.evaluation.write_text("a file stands where the folder goes")
    monkeypatch.setattr("mor_model.weights.load_model", lambda *_, **__: pytest.fail("computed for nothing"))
    with pytest.raises(RunError, match=r"evaluation: cannot be written .* nothing was computed"):
        evaluate_run(run, ["perplexity"], settings=Settings(limit=1))


def test_each_result_is_written_as_soon_as_it_is_there(run, monkeypatch):
    sound = evaluate.evaluate_model

    def fails_at_own(model, tokenizer, suites, **options):
        if "own" in suites:
            raise KeyboardInterrupt
        return sound(model, tokenizer, suites, **options)

    monkeypatch.setattr(evaluate, "evaluate_model", fails_at_own)
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(run, ["perplexity", "own"], settings=Settings(limit=1))
    assert json.loads((run.evaluation / "perplexity.json").read_text())["primary"]["value"] > 0


def test_results_that_cannot_be_written_are_returned_with_the_error(run, monkeypatch):
    fill_the_disk(monkeypatch, run.path, "perplexity", "own_")
    message = r"perplexity\.json: not written \(No space left.*own\.json: not written"
    with pytest.raises(Incomplete, match=message) as told:
        evaluate_run(run, ["perplexity", "own", "routing"], settings=Settings(limit=1))
    assert list(told.value.results) == ["perplexity", "own", "routing"]
    assert (run.evaluation / "routing.json").is_file()


def test_a_full_temporary_folder_is_named(run, monkeypatch, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    fill_the_disk(monkeypatch, scratch, "own_")
    with pytest.raises(RunError, match=r"own not evaluated: .*scratch has room, or let TMPDIR"):
        evaluate_run(run, ["own"], settings=Settings(limit=1))


def test_mor_eval_shows_what_it_could_not_write_and_exits_with_2(run, monkeypatch, capsys, tmp_path):
    fill_the_disk(monkeypatch, tmp_path, "perplexity.json", "table.md")
    code, shown, said = mor(
        monkeypatch, capsys, "eval", run.path, "-s", "perplexity", "--limit", 1, "--device", "cpu",
        "--markdown", tmp_path / "table.md",
    )  # fmt: skip
    assert code == 2 and "bits_per_byte" in shown
    assert said.count("not written (No space left on device)") == 2 and said.count("\n") == 1
    table = tmp_path / "file" / "table.md"
    table.parent.write_text("no folder")
    code, shown, said = mor(monkeypatch, capsys, "eval", run.path, "-s", "perplexity", "--markdown", table)
    assert (code, shown) == (2, "") and "file: cannot be written" in said


def test_suites_that_can_run_do_beside_those_that_cannot(run, monkeypatch, capsys, tmp_path):
    """Beside missing text, damaged questions and a run without weights, what can be evaluated is, and is recorded."""
    questions(tmp_path / "eval", 3)
    (tmp_path / "eval" / "copa.validation.jsonl").write_text("{")
    monkeypatch.setenv("MOR_SHARED_DATA", str(tmp_path))
    (tmp_path / "data").rename(tmp_path / "moved")
    begun = make_run(tmp_path / "other" / "begun", [prose(1, 12)])
    (begun.weights / "model.safetensors").unlink()
    chosen = [*(f"--suite={name}" for name in ("perplexity", "copa", "winogrande", "routing")), "--device", "cpu"]
    code, shown, said = mor(monkeypatch, capsys, "eval", begun.path, run.path, *chosen)
    assert code == 2 and "winogrande" in shown and said.count("\n") == 1
    assert [file.name for file in run.evaluation.iterdir()] == ["winogrande.json"]
    assert f"perplexity, copa, winogrande, routing not evaluated: {begun.weights}" in said and "let it finish" in said
    assert f"perplexity, routing not evaluated: {tmp_path}/data/held_out" in said and "--data DIR" in said
    assert f"copa not evaluated: {tmp_path}/eval/copa.validation.jsonl:1: not JSON" in said
    (tmp_path / "eval" / "copa.validation.jsonl").unlink()
    code, _, said = mor(monkeypatch, capsys, "eval", run.path, *chosen, "--data", tmp_path / "moved")
    assert (code, said) == (0, "")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--device", "tpu"], "--device tpu: is neither cpu nor cuda"),
        (["--device", "cuda"], "has no GPU"),
        (["--routing", "top"], "is not one of causal, topk"),
        (["--depth", "9"], "between 1 and the model's 3"),
        (["--limit", str(10**30)], "evaluation limit: must be a whole number"),
        (["--data", "nowhere"], "nowhere/held_out/test.jsonl.zst: missing"),
    ],
)
def test_wrong_values_on_the_command_line_are_one_line(run, monkeypatch, capsys, option, message):
    if "cuda" in option:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, said = mor(monkeypatch, capsys, "eval", run.path, "-s", "perplexity", *option)
    assert code == 2 and message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "recipe", ["data: 5", "data: {path: [1]}", "data: {sources: [1]}", "[", "data: {sources: 7}", "", None]
)
def test_a_recipe_that_names_no_data_is_one_sentence(run, recipe):
    run.recipe_file.unlink() if recipe is None else run.recipe_file.write_text(recipe)
    with pytest.raises(RunError, match=r"recipe\.yaml: names no data set .* --data DIR"):
        evaluate_run(run, ["perplexity"], settings=Settings(limit=1))


def test_an_export_that_cannot_be_written_is_one_sentence(run, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with monkeypatch.context() as patch:
        patch.setattr("mor_model.weights.load_model", lambda *_, **__: pytest.fail("computed for nothing"))
        code, _, said = mor(patch, capsys, "export", run.path, "--out", tmp_path / "file" / "out")
    assert code == 2 and "file: cannot be written" in said and said.count("\n") == 1

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    code, _, said = mor(monkeypatch, capsys, "export", run.path, "--out", tmp_path / "out")
    assert code == 2 and "out: not written" in said and not (tmp_path / "out").exists()


def test_an_import_that_cannot_be_written_leaves_nothing_half_done(monkeypatch, capsys, tmp_path):
    run = make_run(tmp_path / "llama", [prose(1, 12)], router=None, sharing="none", recursions=1, num_layers=2)
    assert is_llama(load_model(run.weights).config)
    assert mor(monkeypatch, capsys, "export", run.path, "--out", tmp_path / "hf")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        code, _, said = mor(patch, capsys, "import", "hf", tmp_path / "hf", "--out", tmp_path / "again")
    assert code == 2 and "again: not written" in said and not (tmp_path / "again").exists()
    assert mor(monkeypatch, capsys, "import", "hf", tmp_path / "hf", "--out", tmp_path / "again")[0] == 0
