"""Routing analysis on a network whose depths and losses are known for every token."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pretrain.evaluation.likelihood import Scorer
from pretrain.evaluation.routing_analysis import evaluate_routing, pack, token_class
from tests.pretrain.evaluation.stubs import EOD, BigramModel, ByteTokenizer, log_probabilities

TEXTS = ["Some words, 12 of them.\nAnd a second line here to fill windows.", "Another document; ünïcode too."]


def test_windows_share_one_token_and_hold_the_documents_in_order():
    windows = pack([[1, 2, 3], [4, 5], [6, 7, 8]], EOD, length=4)
    assert windows.tolist() == [[1, 2, 3, EOD, 4], [4, 5, EOD, 6, 7]]
    assert pack([[1, 2]], EOD, length=10).tolist() == [[1, 2, EOD]]
    assert len(pack([], EOD, length=10)) == 0


def test_the_leak_is_causal_minus_top_k_and_every_share_adds_up():
    model = BigramModel(context_length=8)
    result = evaluate_routing(Scorer(model, EOD), ByteTokenizer(), TEXTS)
    windows = pack([list(text.encode()) for text in TEXTS], EOD, 8)
    table = log_probabilities(model)
    causal = np.mean([[-table[a, b] for a, b in itertools.pairwise(row)] for row in windows])
    assert result["metrics"]["loss_causal"] == pytest.approx(causal, rel=1e-5)
    # The stub's top-k losses are half its causal ones.
    assert result["metrics"]["leak"] == pytest.approx(causal / 2, rel=1e-5)
    depths = 1 + windows[:, :-1] % 3
    for name in ("causal", "topk"):
        assert result["depth_histogram"][name] == pytest.approx([(depths == d).mean() for d in range(4)])
        assert result["metrics"][f"mean_depth_{name}"] == pytest.approx(depths.mean())
    classes = result["token_classes"]
    assert sum(row["share"] for row in classes.values()) == pytest.approx(1.0)
    assert sum(row["share"] * row["mean_depth"] for row in classes.values()) == pytest.approx(depths.mean())
    assert sum(row["share"] * row["loss"] for row in classes.values()) == pytest.approx(causal, rel=1e-5)
    shares, losses = result["depth_histogram"]["causal"], result["loss_at_depth"]
    assert sum(s * loss for s, loss in zip(shares, losses) if loss is not None) == pytest.approx(causal, rel=1e-5)


def test_without_a_router_every_token_takes_every_step_and_nothing_leaks():
    model = BigramModel(context_length=8, routed=False)
    result = evaluate_routing(Scorer(model, EOD), ByteTokenizer(), TEXTS)
    assert result["depth_histogram"] == {"causal": [0.0, 0.0, 0.0, 1.0]}
    assert "leak" not in result["metrics"]
    assert {routing for routing, _, _ in model.calls} == {"causal"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" the", "word start"),
        ("ing", "word inside"),
        (" \n", "white space"),
        (" 1945", "number"),
        ("),", "punctuation"),
        ("\ufffd", "other"),
        (" don't", "word start"),
        ("3rd", "word inside"),
    ],
)
def test_classes_of_tokens(text, expected):
    assert token_class(text) == expected
