"""Who earns a point: nobody by standing first, and no network that gives no numbers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from pretrain.evaluation.evaluate import evaluate_model
from pretrain.evaluation.held_out import Document
from pretrain.evaluation.likelihood import Scorer, Window
from pretrain.evaluation.settings import Settings
from pretrain.evaluation.summary import markdown_summary, summary_rows
from tests.pretrain.evaluation.stubs import EOD, VOCABULARY, BigramModel, ByteTokenizer, ask
from tests.pretrain.evaluation.test_own_suite import prose


def constant(value: float = 0.0) -> BigramModel:
    """A network that finds every token equally likely; with NaN, none."""
    model = BigramModel(context_length=512)
    model.table.data.fill_(value)
    return model


CHOICE = (
    "output_type: multiple_choice\ntarget_delimiter: ''\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{options}}'\n"
    "doc_to_target: right\nmetric_list:\n  - {metric: acc}\n  - {metric: acc_norm}\n"
)


def test_options_that_tie_share_the_point(tmp_path):
    # Equally long options are equally likely; "ccc" is less likely than both, but as likely by the letter.
    records = [
        {"q": "?", "options": ["aa", "bb"], "right": 0},
        {"q": "?", "options": ["aa", "bb", "ccc"], "right": 1},
        {"q": "?", "options": ["aa", "bb", "ccc"], "right": 2},
    ]
    task = ask(tmp_path, constant(), records, CHOICE)
    assert task["metrics"]["acc"] == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    assert task["metrics"]["acc_norm"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 3) / 3)
    assert task["not_finite"] == 0


def test_f1_counts_a_tie_as_its_share_of_every_prediction(tmp_path):
    task = (
        "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: ['aa', 'bb']\ndoc_to_target: right\n"
        "metric_list:\n  - {metric: acc}\n  - {metric: f1}\n"
    )
    right = [0, 1, 1, 0, 1]
    found = ask(tmp_path, constant(), [{"q": f"{n}?", "right": value} for n, value in enumerate(right)], task)
    # Half of each question says 1: 1.5 of the 3 are found, 2.5 are said in all.
    assert found["metrics"]["f1"] == pytest.approx(2 * 1.5 / (3 + 2.5)) and found["stderr"]["f1"] > 0
    assert found["metrics"]["acc"] == 0.5


def test_greedy_decoding_of_equally_likely_tokens_is_chance():
    likelihood, greedy = Scorer(constant(), EOD).score([Window((1,), (0,)), Window((1,), (0, 5))])
    np.testing.assert_allclose(likelihood, [-math.log(VOCABULARY), -2 * math.log(VOCABULARY)])
    np.testing.assert_allclose(greedy, [1 / VOCABULARY, 1 / VOCABULARY**2])
    likelihood, greedy = Scorer(constant(math.nan), EOD).score([Window((1,), (0,))])
    assert math.isnan(likelihood[0]) and greedy[0] == 0.0
    documents = [Document(prose(seed), "") for seed in range(6)]
    own = evaluate_model(constant(), ByteTokenizer(), ["own"], documents=documents)["own"]
    assert own["tasks"]["own_last_word"]["metrics"]["acc"] < 1e-6


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_network_without_numbers_earns_nothing_and_is_named(monkeypatch, shared_data, value):
    monkeypatch.setenv("MOR_SHARED_DATA", str(shared_data))
    documents = [Document(prose(seed), "") for seed in range(6)]
    suites = ["perplexity", "own", "routing", "copa", "wikitext", "lambada", "mrpc"]
    results = evaluate_model(constant(value), ByteTokenizer(), suites, settings=Settings(limit=5), documents=documents)
    json.dumps(results, allow_nan=False)
    for suite, result in results.items():
        task = result["tasks"][suite]
        assert result["primary"]["value"] is None and result["primary"]["stderr"] is None
        assert task["not_finite"] == task["n"] > 0
        counted = {name: value for name, value in task["metrics"].items() if not name.startswith("mean_depth")}
        assert counted and set(counted.values()) == {None}, suite
    _, rows = summary_rows({"diverged": results})
    assert all(row[4].startswith("not finite (") for row in rows)
    assert markdown_summary({"diverged": results}).count("Warning: diverged: ") == len(suites)


def test_one_question_without_a_number_is_not_averaged_away(tmp_path):
    model = constant()
    model.table.data[ord("!")] = math.nan
    records = [{"q": q, "options": ["aa", "bb"], "right": 0} for q in ("a?", "b!", "c?")]
    task = ask(tmp_path, model, records, CHOICE)
    assert task["not_finite"] == 1 and all(math.isnan(value) for value in task["metrics"].values())


def test_an_option_without_a_token_is_no_certainty(tmp_path):
    class Deaf(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            return list(text.replace("bb", "").encode())

    task = ask(tmp_path, constant(), [{"q": "?", "options": ["aa", "bb"], "right": 1}], CHOICE, Deaf())
    assert task["not_finite"] == 1 and math.isnan(task["metrics"]["acc"])


def test_a_model_that_is_far_off_has_no_perplexity_and_no_traceback(tmp_path):
    """exp(800) is no float; the harness raised OverflowError."""
    model = constant()
    model.table.data[:, :] = torch.zeros(VOCABULARY)
    model.table.data[:, ord("a")] = -800.0
    word = (
        "output_type: loglikelihood\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{answer}}'\n"
        "metric_list:\n  - {metric: perplexity}\n  - {metric: acc}\n"
    )
    task = ask(tmp_path, model, [{"q": "?", "answer": "a"}], word)
    assert task["metrics"]["perplexity"] == math.inf and task["metrics"]["acc"] == 0.0
    assert task["not_finite"] == 0 and task["metrics"]["bits_per_byte"] > 1000
