"""The adapter against the harness's own Hugging Face model, and against sums worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from lm_eval.api.instance import Instance

from pretrain.errors import UserError
from pretrain.evaluation.likelihood import Scorer
from pretrain.evaluation.lm_adapter import HarnessModel
from tests.pretrain.evaluation.stubs import EOD, BigramModel, ByteTokenizer, by_hand


def adapter(**options) -> HarnessModel:
    return HarnessModel(Scorer(BigramModel(context_length=16), EOD, **options), ByteTokenizer())


def ask(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, argument, number) for number, argument in enumerate(arguments)]


def test_a_continuation_takes_the_spaces_at_the_end_of_its_context():
    model = adapter()
    (first, greedy), (second, _) = model.loglikelihood(ask("loglikelihood", ("ab  ", "cd"), ("ab", "  cd")))
    expected = by_hand(model.scorer.model, list(b"ab  cd"), first=2)
    assert first == second == pytest.approx(expected, rel=1e-6)
    assert not greedy


def test_without_a_context_the_end_of_document_stands_in_front():
    model = adapter()
    [(value, _)] = model.loglikelihood(ask("loglikelihood", ("", "abc")))
    assert value == pytest.approx(by_hand(model.scorer.model, [EOD, *b"abc"]), rel=1e-6)


def test_long_contexts_lose_their_beginning_and_long_answers_lose_nothing():
    model = adapter()
    answer = "x" * 40
    values = model.loglikelihood(ask("loglikelihood", ("q" * 100, "a"), ("q", answer)))
    assert values[0][0] == pytest.approx(by_hand(model.scorer.model, list(b"qa")), rel=1e-6)
    assert values[1][0] == pytest.approx(by_hand(model.scorer.model, list(b"q" + answer.encode())), rel=1e-6)


def test_rolling_covers_every_token_once():
    model = adapter()
    texts = ["short", "a text that needs several windows of sixteen tokens each", "sixteen tokens!!"]
    values = model.loglikelihood_rolling(ask("loglikelihood_rolling", *((text,) for text in texts)))
    for value, text in zip(values, texts):
        assert value == pytest.approx(by_hand(model.scorer.model, [EOD, *text.encode()]), rel=1e-6)


def test_a_tokenizer_that_leaves_the_continuation_without_tokens_is_no_crash():
    class Greedy(ByteTokenizer):
        def encode(self, text):
            return [1] if text == "ab" else super().encode(text)

    model = HarnessModel(Scorer(BigramModel(), EOD), Greedy())
    [(value, _)] = model.loglikelihood(ask("loglikelihood", ("a", "b")))
    assert value == pytest.approx(by_hand(model.scorer.model, [ord("a"), ord("b")]), rel=1e-6)


def test_text_is_cut_at_stop_strings_and_top_k_cannot_write(monkeypatch):
    import mor_model.generation

    asked = []

    def generate(model, prompt_ids, **options):
        asked.append((prompt_ids, options))
        return SimpleNamespace(tokens=[[*b"one. two\n\nthree", EOD]])

    monkeypatch.setattr(mor_model.generation, "generate", generate)
    model = adapter(depth=2)
    requests = ask("generate_until", ("p" * 50, {"until": ["\n\n"], "max_gen_toks": 4}), ("", {"until": "."}))
    assert model.generate_until(requests) == ["one. two", "one"]
    assert asked[0][0] == [[ord("p")] * 12]
    assert asked[0][1]["depth"] == 2 and asked[0][1]["max_new_tokens"] == 4
    assert asked[1][0] == [[EOD]]
    with pytest.raises(UserError, match="top-k"):
        adapter(routing="topk").generate_until(requests)
