"""Schedules against their formulas, worked out here by hand and by sums."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.recipe.schedules import BatchSize, LearningRate, Recursion


def test_warmup_stable_decay_by_hand() -> None:
    rate = LearningRate("wsd", steps=10, warmup=2, decay=4)
    assert [rate.factor(n) for n in range(10)] == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_one_minus_sqrt_decay_by_hand() -> None:
    rate = LearningRate("wsd", steps=10, warmup=0, decay=4, decay_shape="1-sqrt")
    assert [rate.factor(n) for n in range(6, 10)] == pytest.approx([1.0, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)])


def test_cosine_linear_and_constant() -> None:
    cosine = LearningRate("cosine", steps=12, warmup=2, floor=0.1)
    assert [cosine.factor(n) for n in (0, 1, 2, 7)] == pytest.approx([0.5, 1.0, 1.0, 0.55])
    linear = LearningRate("linear", steps=12, warmup=2)
    assert [linear.factor(n) for n in (2, 7, 11)] == pytest.approx([1.0, 0.5, 0.1])
    constant = LearningRate("constant", steps=12, warmup=2)
    assert [constant.factor(n) for n in (0, 5, 11)] == [0.5, 1.0, 1.0]


@given(
    kind=st.sampled_from(["wsd", "cosine", "linear", "constant"]),
    steps=st.integers(2, 300),
    shares=st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)),
    shape=st.sampled_from(["linear", "1-sqrt"]),
    floor=st.floats(0, 0.9),
)
def test_the_rate_rises_once_and_falls_once(
    kind: str, steps: int, shares: tuple[float, float], shape: str, floor: float
) -> None:
    rate = LearningRate(kind, steps, int(shares[0] * steps), int(shares[1] * steps), shape, floor)
    factors = [rate.factor(n) for n in range(steps)]
    top = factors.index(max(factors))
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert min(factors[rate.warmup :]) >= floor


@given(doublings=st.integers(0, 5), warmup=st.integers(0, 60), start=st.sampled_from([2, 6, 8]))
def test_the_batch_doubles_up_to_its_size(doublings: int, warmup: int, start: int) -> None:
    batch = BatchSize(start * 2**doublings, start, warmup)
    sizes = [batch.at(n) for n in range(warmup + 5)]
    assert sizes == sorted(sizes) and sizes[warmup:] == [batch.full] * 5
    assert set(sizes) <= set(batch.sizes)
    if doublings and warmup >= doublings:
        assert set(sizes) == set(batch.sizes)
    assert [batch.before(n) for n in range(len(sizes) + 1)] == [sum(sizes[:n]) for n in range(len(sizes) + 1)]


def test_capacities_start_at_one_and_end_as_configured() -> None:
    recursion = Recursion((1.0, 2 / 3, 1 / 3), capacity_warmup=4)
    assert recursion.capacities_at(0) == (1.0, 1.0, 1.0)
    assert recursion.capacities_at(2) == pytest.approx((1.0, 5 / 6, 2 / 3))
    assert recursion.capacities_at(4) is None and recursion.active_at(99) == (1.0, 2 / 3, 1 / 3)
    for step in range(4):
        assert all(later <= now for now, later in zip(recursion.active_at(step), recursion.active_at(step + 1)))


def test_depth_grows_in_stages_and_then_routers_decide() -> None:
    recursion = Recursion((1.0, 0.5, 0.25, 0.25), depth_warmup=6)
    assert [recursion.depth_at(step) for step in range(8)] == [1, 1, 2, 2, 3, 3, None, None]
    assert recursion.active_at(3) == (1.0, 1.0, 0.0, 0.0)
    assert recursion.active_at(6) == (1.0, 0.5, 0.25, 0.25) and recursion.warmup == 6
