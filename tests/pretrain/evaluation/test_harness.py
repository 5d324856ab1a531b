"""Suites through the harness: its questions, asked of a network whose answers can be worked out by hand."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest

from data_prep.errors import DataError
from pretrain.errors import UserError
from pretrain.evaluation import suites
from pretrain.evaluation.evaluate import evaluate_model
from pretrain.evaluation.local_data import read_records
from pretrain.evaluation.settings import Settings
from pretrain.evaluation.suites import benchmarks, check_suites
from pretrain.evaluation.summary import summary_rows, warning_lines
from pretrain.evaluation.task_files import plan_tasks, task_settings
from tests.pretrain.evaluation.stubs import EOD, BigramModel, ByteTokenizer, Lossy, ask, by_hand, log_probabilities

LIMIT = 12


@pytest.fixture(scope="module")
def model() -> BigramModel:
    return BigramModel(context_length=4096)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError(f"evaluation tried to reach {arguments}")

    monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.fixture
def evaluation_sets(shared_data: Path, monkeypatch) -> Path:
    monkeypatch.setenv("MOR_SHARED_DATA", str(shared_data))
    return shared_data / "eval"


def records(file: Path) -> list[dict]:
    with file.open(encoding="utf-8") as stream:
        return [json.loads(next(stream)) for _ in range(LIMIT)]


def likelihood(model: BigramModel, context: str, answer: str) -> float:
    before = list(context.encode()) or [EOD]
    return by_hand(model, [*before, *answer.encode()], first=len(before))


def accuracy(model: BigramModel, questions: list[tuple[list[tuple[str, str]], int]]) -> float:
    """Share of questions whose right (context, answer) pair is the likeliest."""
    hits = []
    for pairs, gold in questions:
        values = [likelihood(model, context, answer) for context, answer in pairs]
        hits.append(values.index(max(values)) == gold)
    return statistics.fmean(hits)


def test_arc_easy_by_hand(model, evaluation_sets):
    result = evaluate_model(model, ByteTokenizer(), ["arc_easy"], settings=Settings(limit=LIMIT))["arc_easy"]
    questions, nats, size = [], 0.0, 0
    for record in records(evaluation_sets / "arc_easy.test.jsonl"):
        context = f"Question: {record['question']}\nAnswer:"
        gold = record["choices"]["label"].index(record["answerKey"])
        questions.append(([(context, " " + text) for text in record["choices"]["text"]], gold))
        nats -= likelihood(model, *questions[-1][0][gold])
        size += len(questions[-1][0][gold][1].encode())
    task = result["tasks"]["arc_easy"]
    assert task["metrics"]["acc"] == accuracy(model, questions)
    assert task["metrics"]["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-6)
    share = task["metrics"]["acc"]
    assert task["stderr"]["acc"] == pytest.approx(math.sqrt(share * (1 - share) / (LIMIT - 1)))
    assert (task["n"], task["split"], task["routing"], task["depth"]) == (LIMIT, "test", "causal", None)
    assert result["primary"]["value"] == share and result["primary"]["chance"] == 0.25
    assert result["skipped"] == []


def test_wikitext_by_hand(model, evaluation_sets):
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    pages = [record["page"] for record in read_records(evaluation_sets / "wikitext/wiki.test.raw")[:2]]
    texts = [wikitext_detokenizer({"page": page}) for page in pages]
    nats = -sum(likelihood(model, "", text) for text in texts)
    size = sum(len(page.encode()) for page in pages)
    result = evaluate_model(model, ByteTokenizer(), ["wikitext"], settings=Settings(limit=2))["wikitext"]
    task = result["tasks"]["wikitext"]
    assert task["metrics"]["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-6)
    tokens = sum(len(text.encode()) for text in texts)
    assert task["metrics"]["token_perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_boolq_and_wsc273_with_the_fields_their_local_files_have(model, evaluation_sets):
    results = evaluate_model(model, ByteTokenizer(), ["boolq", "wsc273"], settings=Settings(limit=LIMIT))
    questions = []
    for record in records(evaluation_sets / "boolq.validation.jsonl"):
        context = f"{record['passage']}\nQuestion: {record['question']}?\nAnswer:"
        questions.append(([(context, " no"), (context, " yes")], int(record["answer"])))
    assert results["boolq"]["primary"]["value"] == accuracy(model, questions)
    schemas = records(evaluation_sets / "wsc273.jsonl")
    pairs = [([(c, " " + r["continuation"]) for c in r["context_options"]], r["gold"]) for r in schemas]
    assert results["wsc273"]["primary"]["value"] == accuracy(model, pairs)


def test_blimp_is_the_mean_over_its_67_paradigms(model, evaluation_sets):
    result = evaluate_model(model, ByteTokenizer(), ["blimp"], settings=Settings(limit=LIMIT))["blimp"]
    whole = result["tasks"].pop("blimp")
    assert len(result["tasks"]) == 67 and whole["n"] == 67 * LIMIT
    shares = [task["metrics"]["acc"] for task in result["tasks"].values()]
    assert whole["metrics"]["acc"] == pytest.approx(statistics.fmean(shares))


def test_mmlu_asks_after_five_examples_of_its_subject(evaluation_sets):
    """A bigram model likes one letter best whatever the question, so how many it gets right is known."""
    network = BigramModel(context_length=8192)
    result = evaluate_model(network, ByteTokenizer(), ["mmlu"], settings=Settings(limit=3))["mmlu"]
    assert len(result["tasks"]) == 58 and result["tasks"]["mmlu"]["fewshot"] == 5
    letters = log_probabilities(network)[ord(" "), [ord(letter) for letter in "ABCD"]]
    asked: dict[str, list[int]] = {}
    with (evaluation_sets / "mmlu.test.jsonl").open(encoding="utf-8") as stream:
        for record in map(json.loads, stream):
            asked.setdefault(record["subject"], []).append(record["answer"])
    right = [answer == letters.argmax() for answers in asked.values() for answer in answers[:3]]
    assert result["tasks"]["mmlu"]["metrics"]["acc"] == pytest.approx(statistics.fmean(right))
    # Four one-letter answers are one row of tokens.
    assert sum(rows for _, _, (rows, _) in network.calls) == 57 * 3


@pytest.mark.parametrize("name", [n for n in benchmarks() if n not in ("blimp", "mmlu")])
def test_every_other_benchmark_runs_from_local_files(model, evaluation_sets, name):
    result = evaluate_model(model, ByteTokenizer(), [name], settings=Settings(limit=4))[name]
    assert not result["skipped"]
    assert result["primary"]["n"] == 4 and math.isfinite(result["primary"]["value"])


def test_without_data_everything_is_skipped_with_its_reason_and_remedy(model, monkeypatch):
    monkeypatch.delenv("MOR_SHARED_DATA", raising=False)
    results = evaluate_model(model, ByteTokenizer(), ["blimp", "hellaswag", "own"], settings=Settings(limit=2))
    assert len(results["blimp"]["skipped"]) == 67
    entry = results["hellaswag"]["skipped"][0]
    assert entry["task"] == "hellaswag" and "not set" in entry["why"] and "--hub" in entry["how"]
    assert results["own"]["skipped"][0]["why"] == "there is no held-out text, or none within --text-bytes"
    assert all(result["tasks"] == {} and result["primary"] is None for result in results.values())


def test_tasks_read_local_files_or_if_allowed_the_hub(tmp_path):
    row = benchmarks()["arc_easy"]
    (tmp_path / "arc_easy.test.jsonl").write_text("{}\n")
    plan = plan_tasks(row, tmp_path, hub=False)
    assert not plan.local and "arc_easy.train.jsonl is missing" in plan.skipped[0]["why"]
    plan = plan_tasks(row, tmp_path, hub=True)
    assert not plan.local and not plan.skipped and "custom_dataset" not in plan.hub["arc_easy"]


def test_a_hub_that_does_not_give_its_data_is_a_reason_to_skip(model, monkeypatch):
    import datasets

    monkeypatch.delenv("MOR_SHARED_DATA", raising=False)
    monkeypatch.setattr("pretrain.evaluation.evaluate.hub_answers", lambda: True)

    def unreachable(*arguments, **options):
        raise ConnectionError("504 from the hub\nand much detail")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    result = evaluate_model(model, ByteTokenizer(), ["piqa"], settings=Settings(limit=2, hub=True))["piqa"]
    assert result["tasks"] == {} and result["skipped"][0]["why"] == "the hub did not give its data (504 from the hub)"


def test_the_hub_does_not_answer_where_it_is_forbidden(monkeypatch):
    suites.hub_answers.cache_clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # With connections refused by the fixture, asking would raise.
    assert suites.hub_answers() is False
    suites.hub_answers.cache_clear()


def test_broken_data_is_refused_by_name(tmp_path, monkeypatch):
    assert check_suites(["own", "all"])[0] == "own" and len(check_suites(["all"])) == len(benchmarks()) + 3
    monkeypatch.setenv("MOR_SHARED_DATA", str(tmp_path))
    with pytest.raises(UserError, match="has no folder eval/"):
        suites.shared_evaluation_data()
    file = tmp_path / "a.jsonl"
    for content, problem in (('{"a": 1}\n{"a": \n', r"a\.jsonl:2: not JSON"), ("\n", "holds no records")):
        file.write_text(content)
        with pytest.raises(DataError, match=problem):
            read_records(file)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"sentence": "a _ b", "option1": "x", "option2": "y"}, ":3: the field 'answer' is missing here"),
        ({"sentence": None, "option1": "x", "option2": "y", "answer": "1"}, ":3: the field 'sentence' is"),
        ({"sentence": ["a"], "option1": "x", "option2": "y", "answer": "1"}, ":3: the field 'sentence' is"),
        ({"sentence": "no gap", "option1": "x", "option2": "y", "answer": "1"}, "not the records that this task asks"),
        ({"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "3"}, "not the records that this task asks"),
    ],
)
def test_questions_of_another_kind_are_refused_with_their_place(model, tmp_path, monkeypatch, line, message):
    file = tmp_path / "eval" / "winogrande.validation.jsonl"
    file.parent.mkdir()
    good = {"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "1"}
    file.write_text("".join(json.dumps(record) + "\n" for record in (good, good, line)))
    monkeypatch.setenv("MOR_SHARED_DATA", str(tmp_path))
    with pytest.raises(DataError, match=message) as refused:
        evaluate_model(model, ByteTokenizer(), ["winogrande"])
    assert str(file) in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- copa", "a mapping"),
        ("copa: {tasks: [x], local: {validation: 1}, metric: acc}", r"copa: local\.validation: must be text"),
        ("copa: {tasks: [x], local: {}, metric: acc, chanse: 1}", "copa: unknown key 'chanse'; did you mean 'chance'"),
    ],
)
def test_a_wrong_row_of_the_benchmarks_is_named(tmp_path, monkeypatch, text, message):
    monkeypatch.setattr(suites, "TASKS", tmp_path)
    (tmp_path / "benchmarks.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        benchmarks.__wrapped__()


@pytest.mark.parametrize("text", ["- 1", "task: [a]", "dataset_name: x"])
def test_a_task_file_that_is_none_is_named(tmp_path, text):
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(UserError, match=r"wrong\.yaml: names no task.*constraints\.txt"):
        task_settings(tmp_path / "wrong.yaml")


def test_prompts_that_do_not_fit_are_counted_and_warned_of(tmp_path, monkeypatch):
    """Questions of 60 bytes behind five examples, in a context that holds one."""
    folder = tmp_path / "eval"
    folder.mkdir()
    record = {"subject": "anatomy", "choices": list("wxyz"), "answer": 1}
    for split, count in (("dev", 5), ("test", 3)):
        lines = ({**record, "question": f"{n} " + "q" * 20} for n in range(count))
        (folder / f"mmlu.{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setenv("MOR_SHARED_DATA", str(tmp_path))
    row = benchmarks()["mmlu"].model_copy(update={"tasks": ("mmlu/default/mmlu_anatomy.yaml",)})
    monkeypatch.setattr("pretrain.evaluation.evaluate.benchmarks", lambda: {"mmlu": row})
    results = {
        name: evaluate_model(BigramModel(context_length=length), ByteTokenizer(), ["mmlu"])
        for name, length in (("short", 128), ("long", 4096))
    }
    tasks = [result["mmlu"]["tasks"]["mmlu"] for result in results.values()]
    assert [(task["prompts_cut"], task["n"], task["fewshot"]) for task in tasks] == [(3, 3, 5), (0, 3, 5)]
    _, [row_of_table] = summary_rows(results)
    assert row_of_table[4].endswith("(3 of 3 prompts cut)") and "cut" not in row_of_table[5]
    [warning] = warning_lines(results)
    assert "short: mmlu: 3 of 3 prompts" in warning and "fewer than the 5 examples" in warning


def test_text_that_the_tokenizer_loses_has_no_bits_per_byte(model, tmp_path):
    lines = (
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list:\n"
        "  - {metric: word_perplexity}\n  - {metric: byte_perplexity}\n  - {metric: bits_per_byte}\n"
    )
    whole, lossy = (ask(tmp_path, model, [{"text": text}], lines, Lossy()) for text in ("abcde" * 4, "abcüx" * 4))
    assert whole["lost_bytes"] == 0 and math.isfinite(whole["metrics"]["bits_per_byte"])
    assert lossy["lost_bytes"] == 4 * 2 and lossy["scored_bytes"] == 4 * 6
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert math.isnan(lossy["metrics"][name]) and lossy["stderr"][name] is None
    assert math.isfinite(lossy["metrics"]["token_perplexity"])
