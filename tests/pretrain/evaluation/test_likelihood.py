"""Windows and log-likelihoods against the harness's own windows and sums worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from pretrain.errors import UserError
from pretrain.evaluation.likelihood import Scorer, Window, split_windows
from tests.pretrain.evaluation.stubs import EOD, BigramModel, by_hand, log_probabilities


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 48, 100])
@pytest.mark.parametrize("max_length", [1, 3, 16])
def test_rolling_windows_are_those_of_the_harness(length, max_length):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    tokens = list(range(length))
    theirs = [
        make_disjoint_window(pair)
        for pair in get_rolling_token_windows(tokens, prefix_token=EOD, max_seq_len=max_length, context_len=1)
    ]
    ours = split_windows([EOD], tokens, max_length)
    assert [(list(window.context), list(window.targets)) for window in ours] == theirs
    assert [token for window in ours for token in window.targets] == tokens


def test_a_prompt_is_cut_from_the_left_and_a_long_answer_into_pieces():
    assert split_windows(range(10), [100, 101], max_length=5) == [Window((6, 7, 8, 9), (100, 101))]
    long = split_windows([7, 8], range(100, 107), max_length=3)
    assert [window.targets for window in long] == [(100, 101, 102), (103, 104, 105), (106,)]
    assert [window.context for window in long] == [(8,), (102,), (103, 104, 105)]
    assert split_windows([1], [], 4) == []
    with pytest.raises(ValueError, match="END_OF_DOCUMENT"):
        split_windows([], [1], 4)


def test_likelihoods_equal_sums_by_hand_whatever_the_order_and_padding():
    model = BigramModel(context_length=16)
    generator = np.random.default_rng(0)
    windows = []
    for _ in range(60):
        context = generator.integers(0, 257, generator.integers(1, 9)).tolist()
        targets = generator.integers(0, 257, generator.integers(1, 9)).tolist()
        windows.append(Window(tuple(context), tuple(targets)))
    likelihood, greedy = Scorer(model, EOD).score(windows)
    expected = [by_hand(model, [*w.context, *w.targets], first=len(w.context)) for w in windows]
    np.testing.assert_allclose(likelihood, expected, rtol=1e-6)
    assert not greedy.any()


def test_greedy_means_every_target_is_the_most_likely():
    model = BigramModel()
    best = log_probabilities(model).argmax(axis=1)
    second = int(best[best[5]])
    windows = [
        Window((5,), (int(best[5]),)),
        Window((5,), (int(best[5]), second)),
        Window((5,), (int(best[5]), second ^ 1)),
    ]
    assert Scorer(model, EOD).score(windows)[1].tolist() == [True, True, False]


def test_one_row_serves_all_one_token_answers_to_a_question():
    model = BigramModel()
    Scorer(model, EOD).score([Window((1, 2, 3), (answer,)) for answer in range(40)])
    assert [shape for _, _, shape in model.calls] == [(1, 3)]


def test_top_k_batches_hold_rows_of_one_length_and_causal_ones_mix():
    windows = [Window((1,) * length, (2,)) for length in (3, 5, 5, 7)] + [Window((4,) * 5, (2,))]
    model = BigramModel()
    Scorer(model, EOD, routing="topk").score(windows)
    assert sorted(shape for _, _, shape in model.calls) == [(1, 3), (1, 7), (2, 5)]
    model.calls.clear()
    Scorer(model, EOD).score(windows)
    assert [shape for _, _, shape in model.calls] == [(4, 7)]


def test_routing_and_depth_reach_the_network_and_nonsense_is_refused():
    model = BigramModel()
    Scorer(model, EOD, depth=2).score([Window((1,), (2,))])
    assert model.calls[0][:2] == ("causal", 2)
    with pytest.raises(UserError, match="between 1 and the model's 3"):
        Scorer(model, EOD, depth=4)


def test_the_mode_of_the_network_comes_back_and_progress_ends_at_the_total():
    model, seen = BigramModel().train(), []
    scorer = Scorer(model, EOD, progress=lambda done, total: seen.append((done, total)))
    scorer.score([Window((1, 2), (3,)), Window((1,), (3,))])
    assert model.training and seen == [(1, 1)]
