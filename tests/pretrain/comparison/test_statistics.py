from __future__ import annotations

import math
import random

import pytest
from scipy import stats

from pretrain.comparison.report.statistics import (
    difference_of_pairs,
    difference_of_scores,
    difference_of_seeds,
    mean_and_spread,
    wilson_interval,
)


@pytest.mark.parametrize("n", [2, 10, 200])
def test_paired_differences_agree_with_students_t(n):
    draw = random.Random(n)
    a = [draw.gauss(3, 1) for _ in range(n)]
    b = [value + draw.gauss(0.1, 0.2) for value in a]
    found = difference_of_pairs(b, a)
    interval = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert found.low == pytest.approx(interval.low, abs=1e-6 * abs(found.half_width))
    assert found.high == pytest.approx(interval.high, abs=1e-6 * abs(found.half_width))


def test_a_paired_ratio_has_the_spread_that_resampling_gives():
    draw = random.Random(0)
    tokens = [draw.randint(20, 400) for _ in range(300)]
    a = [n * (3.0 + draw.gauss(0, 0.5)) for n in tokens]
    b = [x + n * (0.05 + draw.gauss(0, 0.1)) for x, n in zip(a, tokens)]
    found = difference_of_pairs(b, a, tokens)
    assert found.value == pytest.approx(sum(b) / sum(tokens) - sum(a) / sum(tokens))
    resampled = []
    for _ in range(2000):
        chosen = [draw.randrange(300) for _ in range(300)]
        resampled.append(sum(b[i] - a[i] for i in chosen) / sum(tokens[i] for i in chosen))
    assert found.half_width == pytest.approx(1.96 * stats.tstd(resampled), rel=0.1)


def test_unpaired_differences_add_their_variances():
    found = difference_of_scores(2.0, 0.03, 1.9, 0.04)
    assert found.value == pytest.approx(0.1)
    assert found.half_width == pytest.approx(stats.norm.ppf(0.975) * 0.05, rel=1e-4)
    assert found.clear
    assert not difference_of_scores(2.0, 0.3, 1.9, 0.4).clear
    assert difference_of_scores(2.0, None, 1.9, 0.4).half_width is None
    # No spread is no certainty: the standard error of one document is zero.
    assert difference_of_scores(2.0, 0.0, 1.9, 0.0).half_width is None


def test_seeds_are_paired_and_one_seed_says_nothing():
    assert difference_of_seeds({1: 3.0}, {1: 2.9}) is None
    assert difference_of_seeds({1: 3.0, 2: 3.1}, {1: 2.9, 3: 3.0}) is None
    # No spread is no certainty: the seeds changed nothing.
    assert difference_of_seeds({1: 3.1, 2: 3.2, 3: 3.3}, {1: 3.0, 2: 3.1, 3: 3.2}).half_width is None
    found = difference_of_seeds({1: 3.0, 2: 3.2, 3: 3.1}, {1: 2.9, 2: 3.1, 3: 3.05})
    assert found is not None and found.over == "seeds"
    assert found.value == pytest.approx((0.1 + 0.1 + 0.05) / 3)


def test_intervals_of_shares_are_wilsons():
    """Newcombe 1998, table I: 81 of 263 and 0 of 20."""
    assert wilson_interval(81 / 263, 263) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))
    assert wilson_interval(0.0, 20) == (pytest.approx(0.0, abs=5e-5), pytest.approx(0.1611, abs=5e-5))


@pytest.mark.parametrize(("share", "n"), [(math.nan, 9), (math.inf, 9), (5.0, 9), (-0.1, 9), (0.5, 0)])
def test_what_is_no_share_of_anything_has_no_interval(share, n):
    assert wilson_interval(share, n) == (0.0, 1.0)


def test_spread_is_the_standard_deviation():
    assert mean_and_spread([1e308, 1e308]) == (1e308, 0.0)  # no overflow
    assert mean_and_spread([1.0]) == (1.0, None)
    assert math.isnan(mean_and_spread([1.0, math.nan, 2.0])[0]) and math.isnan(mean_and_spread([math.inf])[0])
    mean, spread = mean_and_spread([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3) and spread == pytest.approx(math.sqrt(7 / 3))
