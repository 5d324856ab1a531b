"""Curricula: end points, monotony, and values that the network accepts at every step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor_model.config import ExpertChoiceConfig
from mor_model.curriculum import capacity_at, depth_at
from mor_model.errors import ConfigError

shares = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5).map(lambda s: tuple(sorted(s, reverse=True)))


@given(shares, st.integers(0, 1000), st.integers(0, 1000))
def test_capacities_fall_from_one_to_the_configured_ones(capacities, length, step):
    now, later = capacity_at(step, length, capacities), capacity_at(step + 1, length, capacities)
    ExpertChoiceConfig(capacities=now)
    assert all(c <= a + 1e-12 and b <= a + 1e-12 for a, b, c in zip(now, later, capacities))
    assert capacity_at(0, length, capacities) == ((1.0,) * len(capacities) if length else capacities)
    assert capacity_at(length, length, capacities) == capacities


def test_halfway_a_half_cosine_is_at_the_middle():
    assert capacity_at(50, 100, (1.0, 0.5, 0.0)) == pytest.approx((1.0, 0.75, 0.5))
    assert capacity_at(25, 100, (0.0,)) == pytest.approx((0.5 + 0.5 * 0.5**0.5,))


@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 6))
def test_depth_grows_from_one_to_all(step, length, recursions):
    assert 1 <= depth_at(step, length, recursions) <= depth_at(step + 1, length, recursions) <= recursions
    assert depth_at(length, length, recursions) == recursions
    if length >= recursions:
        stages = [depth_at(s, length, recursions) for s in range(length + 1)]
        assert set(stages) == set(range(1, recursions + 1))


@pytest.mark.parametrize("arguments", [(-1, 10), (0, -1)])
def test_negative_steps_are_refused(arguments):
    with pytest.raises(ConfigError, match="must not be negative"):
        capacity_at(*arguments, (1.0,))
    with pytest.raises(ConfigError, match="must not be negative"):
        depth_at(*arguments, 3)
