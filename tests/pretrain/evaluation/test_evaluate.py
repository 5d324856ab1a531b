"""Run folders in, result files out: reuse, labels, refusals, and the command."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
import zstandard

from data_prep.errors import DataError
from data_prep.tokenizers.loading import load_tokenizer
from mor_model.weights import load_model
from pretrain.errors import RunError
from pretrain.evaluation import held_out
from pretrain.evaluation.evaluate import evaluate_model, evaluate_run
from pretrain.evaluation.held_out import Document, choose, read_documents
from pretrain.evaluation.settings import Settings, result_file
from pretrain.evaluation.summary import markdown_summary, skipped_lines, summary_rows
from pretrain.records.run_folder import RunFolder
from tests.pretrain.evaluation.runs import make_run, mor, write_held_out
from tests.pretrain.evaluation.test_own_suite import prose

SUITES = ["perplexity", "own", "routing"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("evaluate") / "run", [prose(seed, 36) for seed in range(5)])


@pytest.fixture(autouse=True)
def no_shared_data(monkeypatch):
    monkeypatch.delenv("MOR_SHARED_DATA", raising=False)


def test_results_are_written_labelled_and_read_again(run, monkeypatch):
    results = evaluate_run(run, SUITES, settings=Settings(limit=8))
    for suite in SUITES:
        stored = json.loads(
            (run.evaluation / f"{suite}.json").read_text(), parse_constant=lambda name: pytest.fail(name)
        )
        assert stored == json.loads(json.dumps(results[suite]))
        assert len(stored["identity"]["weights"]) == 64 and stored["seconds"] > 0
        for task in stored["tasks"].values():
            assert task["n"] > 0 and math.isfinite(task["metrics"]["bits_per_byte"])
            assert task["routing"] == ("causal and topk" if suite == "routing" else "causal")
    assert (run.evaluation / "own" / "own_word_order.yaml").is_file()
    monkeypatch.setattr("mor_model.weights.load_model", lambda *_, **__: pytest.fail("evaluated twice"))
    assert evaluate_run(run, SUITES, settings=Settings(limit=8)) == json.loads(json.dumps(results))


def test_other_routings_and_depths_have_files_of_their_own(run):
    evaluate_run(run, ["perplexity"], settings=Settings(limit=2))
    plain = (run.evaluation / "perplexity.json").read_bytes()
    for settings, name in (
        (Settings(limit=2, routing="topk"), "perplexity.topk.json"),
        (Settings(limit=2, depth=1), "perplexity.depth-1.json"),
    ):
        result = evaluate_run(run, ["perplexity"], settings=settings)["perplexity"]
        assert result_file(run, "perplexity", settings).name == name
        task = result["tasks"]["perplexity"]
        assert (task["routing"], task["depth"]) == (settings.routing, settings.depth)
        assert (run.evaluation / name).is_file()
    assert (run.evaluation / "perplexity.json").read_bytes() == plain


def test_perplexity_is_what_the_network_says_token_by_token(run):
    """Against the network's own loss, a window at a time: a look ahead, or attention to padding, would show."""
    model, tokenizer = load_model(run.weights), load_tokenizer(run.tokenizer)
    texts = [prose(5, 4), "The old river.", prose(6, 1), "A quiet village near the market."]
    expected = []
    for text in texts:
        ids, nats = tokenizer.encode(text), 0.0
        # Window k predicts tokens 64k .. 64k+63; the last one also sees what comes before, up to 64 tokens.
        for start in range(0, len(ids), 64):
            piece = ids[start : start + 64]
            before = ([tokenizer.eod_id, *ids[:start]])[-(65 - len(piece)) :]
            row = torch.tensor([[*before, *piece]])
            with torch.no_grad():
                losses = model(row[:, :-1], row[:, 1:], routing="causal", return_losses=True).losses_BT[0]
            nats += float(losses[-len(piece) :].double().sum())
        expected.append(nats)
    documents = [Document(text, "") for text in texts]
    found = evaluate_model(model, tokenizer, ["perplexity"], documents=documents)["perplexity"]["tasks"]["perplexity"]
    assert sorted(found["documents"]["nats"]) == pytest.approx(sorted(expected), rel=1e-5)
    bits = sum(expected) / sum(len(text.encode()) for text in texts) / math.log(2)
    assert found["metrics"]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_document_masking_gets_its_document_numbers(tmp_path):
    run = make_run(tmp_path / "run", [prose(1, 12)], document_masking=True, reset_positions=True)
    results = evaluate_run(run, SUITES, settings=Settings(limit=2))
    assert all(result["primary"] is not None for result in results.values())


def test_another_tokenizer_than_the_plan_names_is_refused_or_none(tmp_path):
    run = make_run(tmp_path / "run", [prose(1, 12)])
    fingerprint = load_tokenizer(run.tokenizer).fingerprint
    run.write_json(run.plan_file, {"tokenizer_fingerprint": fingerprint})
    assert evaluate_run(run, ["perplexity"], settings=Settings(limit=1))
    run.write_json(run.plan_file, {"tokenizer_fingerprint": "0" * 64})
    with pytest.raises(RunError, match="another tokenizer"):
        evaluate_run(run, ["perplexity"], settings=Settings(limit=2))
    run.tokenizer.rename(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="tokenizer yet"):
        evaluate_run(run, ["perplexity"])


@pytest.mark.gpu
def test_a_gpu_gives_the_numbers_of_the_cpu(run):
    model, tokenizer = load_model(run.weights), load_tokenizer(run.tokenizer)
    documents, _ = read_documents(held_out.held_out_files(run), 10**7)
    found = [
        evaluate_model(model.to(place), tokenizer, SUITES, settings=Settings(limit=5), documents=documents)
        for place in ("cpu", "cuda")
    ]
    for suite in SUITES:
        on_cpu, on_gpu = (result[suite]["tasks"][suite]["metrics"]["bits_per_byte"] for result in found)
        assert on_gpu == pytest.approx(on_cpu, rel=1e-3)


def zstd(text: bytes, **options) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (zstd(b'{"text": "one"}\n')[:12], "damaged"),
        # Cut where every line is whole: a reader that took the end of the file for the end of the text would see one.
        (zstd(b'{"text": "one"}\n', write_checksum=True)[:-4], "ends inside a frame"),
        (zstd(b'{"text": "one", "source": ["a"]}\n'), "text and source must be strings"),
        (zstd(b'{"text": ""}\n{"text": "  "}\n'), "no held-out documents"),
    ],
)
def test_held_out_text_is_checked_where_it_enters(tmp_path, content, message):
    (tmp_path / "test.jsonl.zst").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_documents([tmp_path / "test.jsonl.zst"], 100)


def test_sources_that_are_parts_of_one_data_set_read_its_text_once(tmp_path):
    data = write_held_out(tmp_path / "data", ["one"])
    sources = [
        {"path": str(data), "subset": "web"},
        {"path": f"{data}/", "subset": "books"},
        {"path": f"{data}/../data"},
    ]
    run = RunFolder(tmp_path)
    run.recipe_file.write_text(json.dumps({"data": {"sources": sources}}))
    assert len(read_documents(held_out.held_out_files(run), 100)[0]) == 1


def test_a_machine_without_the_harness_says_so(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RunError, match="own not evaluated: lm-eval is not installed"):
        evaluate_run(run, ["own"], settings=Settings(limit=1))


def test_the_part_of_the_text_that_is_read_is_bounded_in_bytes_and_independent_of_order():
    documents = [Document(f"wörter {number} " * 50, "") for number in range(20)]
    chosen = choose(documents, 3000)
    size = sum(len(document.text.encode()) for document in chosen)
    assert 2900 < size <= 3000
    assert choose(documents[::-1], 3000) == chosen
    assert all(any(whole.text.startswith(part.text) for whole in documents) for part in chosen)
    everything = choose(documents, 10**9)
    assert sorted(everything) == sorted(documents) and everything[: len(chosen) - 1] == chosen[:-1]


def test_reading_keeps_what_choosing_needs_and_knows_the_whole_by_its_digest(tmp_path):
    texts = [prose(seed, 5) for seed in range(30)]
    file = write_held_out(tmp_path, texts) / held_out.TEST_FILE
    everything, digest = read_documents([file], 10**9)
    few, same = read_documents([file], 2000)
    assert len(everything) == 30 and len(few) < 10 and digest == same
    assert choose(few, 2000) == choose(everything, 2000)
    write_held_out(tmp_path, texts[::-1])
    assert read_documents([file], 2000) == (few, digest)
    write_held_out(tmp_path, [*texts[:-1], texts[-1] + " More."])
    assert read_documents([file], 2000)[1] != digest


def test_the_table_shows_values_with_their_errors_and_what_was_skipped(run):
    results = {"one": evaluate_run(run, ["perplexity", "hellaswag"], settings=Settings(limit=4)), "two": {}}
    header, rows = summary_rows(results)
    assert header == ["suite", "metric", "n", "chance", "one", "two"]
    assert rows[0][:2] == ["perplexity", "bits_per_byte ↓"] and "±" in rows[0][4] and rows[0][5] == ""
    assert len(rows) == 1
    [line] = skipped_lines(results)
    assert line.startswith("Skipped: hellaswag, because MOR_SHARED_DATA is not set")
    assert line in markdown_summary(results)


def test_runs_with_and_without_a_router_share_rows_only_for_the_same_metric(run, tmp_path):
    plain = make_run(tmp_path / "plain", [prose(1, 36)], router=None)
    results = {"routed": evaluate_run(run, ["routing"]), "plain": evaluate_run(plain, ["routing"])}
    _, rows = summary_rows(results)
    assert [row[1] for row in rows] == ["loss_causal ↓", "leak ↓"]
    assert all("±" in cell for cell in rows[0][4:])
    assert "±" in rows[1][4] and rows[1][5] == ""


def test_the_command_prints_the_table_and_refuses_in_one_line(run, tmp_path, monkeypatch, capsys):
    table = tmp_path / "table.md"
    chosen = ["--limit", 4, "--suite", "perplexity", "--markdown", table, "--device", "cpu"]
    code, shown, said = mor(monkeypatch, capsys, "eval", run.path, *chosen)
    assert (code, said) == (0, "")
    assert "perplexity" in shown and "±" in table.read_text()
    code, _, said = mor(monkeypatch, capsys, "eval", run.path, "--suite", "perplexty")
    assert code == 2
    assert said == "mor eval: evaluation suite 'perplexty' is unknown; did you mean 'perplexity'?\n"


def test_the_questions_left_in_the_run_folder_are_any_harness_to_ask(run):
    evaluate_run(run, ["own"], settings=Settings(limit=8))
    code = (
        "from lm_eval.tasks import TaskManager\n"
        f"tasks = TaskManager(include_path={str(run.evaluation / 'own')!r}, include_defaults=False)\n"
        "loaded = tasks.load(['own_last_word', 'own_continuation', 'own_word_order'])['tasks']\n"
        "print(*(len(task.eval_docs) > 8 for task in loaded.values()))"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(run.path / "cache"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["True"] * 3, done.stderr
