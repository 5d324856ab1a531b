"""The order of samples: a permutation for every size, another one each epoch, and well mixed."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.reading.sample_order import SampleOrder


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 40) | st.integers(1, 60_000), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 2**40))
def test_every_sequence_once_an_epoch(size: int, seed: int, epoch: int) -> None:
    found = SampleOrder(size, seed).block(epoch * size, size)
    assert np.array_equal(np.sort(found), np.arange(size))


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 2**62), seed=st.integers(0, 2**32), first=st.integers(0, 2**70), count=st.integers(0, 70))
def test_a_block_is_its_samples_at_any_size_and_position(size: int, seed: int, first: int, count: int) -> None:
    order = SampleOrder(size, seed)
    block = order.block(first, count)
    assert block.shape == (count,) and block.dtype == np.int64
    assert [order[first + number] for number in range(count)] == block.tolist()
    assert all(0 <= index < size for index in block.tolist())
    for start in range(0, min(count, size)):
        within = [i for i in range(count) if (first + i) // size == (first + start) // size]
        assert len({int(block[i]) for i in within}) == len(within)


def test_a_known_order_stays_what_it_is() -> None:
    """Guards resumed runs: a change of the order would repeat and skip data silently."""
    two_epochs = [3, 1, 5, 9, 7, 6, 2, 4, 0, 8, 9, 4, 1, 6, 3, 2, 5, 7, 0, 8]
    assert SampleOrder(10, seed=0).block(0, 20).tolist() == two_epochs
    assert SampleOrder(10**12, seed=1, stream="web")[10**13 + 7] == 709686179813


def test_seeds_epochs_and_streams_give_unrelated_orders() -> None:
    size = 5000
    orders = [
        SampleOrder(size, 1).block(0, size),
        SampleOrder(size, 1).block(size, size),
        SampleOrder(size, 2).block(0, size),
        SampleOrder(size, 1, stream="web").block(0, size),
    ]
    for number, order in enumerate(orders):
        for other in orders[:number]:
            assert np.count_nonzero(order == other) < 10  # one agreement is expected by chance
            assert abs(np.corrcoef(order, other)[0, 1]) < 5 / math.sqrt(size)


@pytest.mark.parametrize("size", [3, 4, 5])
def test_all_orders_of_a_few_sequences_are_about_equally_likely(size: int) -> None:
    trials = 10_000
    order = SampleOrder(size, seed=3)
    counts = Counter(map(tuple, order.block(0, trials * size).reshape(trials, size).tolist()))
    expected = trials / math.factorial(size)
    chi = sum((counts[order_] - expected) ** 2 / expected for order_ in permutations(range(size)))
    freedom = math.factorial(size) - 1
    # A uniform choice gives chi = freedom; a bias of 10 % of each probability would add trials * 0.01 = 100.
    assert chi < freedom + 6 * math.sqrt(2 * freedom) + 100


@pytest.mark.parametrize("size", [1_000, 65_536, 100_003])
def test_an_epoch_is_well_mixed(size: int) -> None:
    found = SampleOrder(size, seed=11).block(0, size).astype(float)
    bound = 5 / math.sqrt(size)
    assert abs(np.corrcoef(found, np.arange(size))[0, 1]) < bound
    for lag in (1, 2, 7, math.isqrt(size)):
        assert abs(np.corrcoef(found[:-lag], found[lag:])[0, 1]) < bound
    # Each tenth of the epoch draws evenly from each tenth of the data: chi-square with 81 degrees of freedom.
    table = np.histogram2d(np.arange(size), found, bins=10)[0]
    chi = ((table - size / 100) ** 2 / (size / 100)).sum()
    assert 30 < chi < 160
    # Steps from one sample to the next have no favourite (a weak cipher leaves arithmetic progressions).
    steps = Counter((np.diff(found) % size).astype(int).tolist())
    assert steps.most_common(1)[0][1] < 12
    # As many rising steps as falling ones.
    assert abs(np.count_nonzero(np.diff(found) > 0) / (size - 1) - 0.5) < bound


def test_impossible_orders_are_refused() -> None:
    for size in (0, -3, 2**62 + 1):
        with pytest.raises(DataError, match="sample order needs between 1 and"):
            SampleOrder(size, 0)
    with pytest.raises(IndexError):
        SampleOrder(5, 0)[-1]


def test_pickling() -> None:
    order = SampleOrder(7, seed=2, stream="x")
    assert np.array_equal(pickle.loads(pickle.dumps(order)).block(0, 30), order.block(0, 30))
