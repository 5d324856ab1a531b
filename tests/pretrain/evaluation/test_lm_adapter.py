"""The adapter against sums worked out by hand."""

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


@pytest.mark.parametrize(
    ("context", "continuation", "tokens", "first"),
    [
        ("ab  ", "cd", b"ab  cd", 2),  # the continuation takes the spaces at the end of its context
        ("ab", "  cd", b"ab  cd", 2),
        ("", "abc", [EOD, *b"abc"], 1),
        ("q" * 100, "a", b"qa", 1),  # a long context loses its beginning, a long answer nothing
        ("q", "x" * 40, b"q" + b"x" * 40, 1),
    ],
)
def test_the_likelihood_of_a_continuation(context, continuation, tokens, first):
    model = adapter()
    [(value, greedy)] = model.loglikelihood(ask("loglikelihood", (context, continuation)))
    assert value == pytest.approx(by_hand(model.scorer.model, list(tokens), first), rel=1e-6) and not greedy


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
