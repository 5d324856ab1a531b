"""Pieces: every one handed out once, to the task it belongs to, whatever is lost on the way."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.reading.manifest import Shard
from data_prep.sources.base import Group
from data_prep.tokenizing.piece_schedule import Schedule, Share
from data_prep.tokenizing.receipts import Receipt
from tests.fuzz.support import processor_time

GROUPS = st.lists(
    st.tuples(st.integers(1, 1000), st.integers(1, 40), st.booleans()), min_size=1, max_size=12
)  # bytes, pieces, whether the number of pieces is known


def groups_of(shape):
    return tuple(
        Group(number, "s", "jsonl", (f"{number}",), size, pieces if known else None, 100)
        for number, (size, pieces, known) in enumerate(shape)
    )


def receipt(key, shape, tokens=0):
    shards = {"train": [Shard("x", tokens, 1, 1, "", "", "s")]} if tokens else {}
    return Receipt(*key, last=key[1] + 1 >= shape[key[0]][1], shards=shards)


@settings(max_examples=200, deadline=None)
@given(shape=GROUPS, count=st.integers(1, 12), workers=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_all_tasks_together_do_every_piece_once(shape, count, workers, seed):
    luck = random.Random(seed)
    groups = groups_of(shape)
    done: list[tuple[int, int]] = []
    for index in range(count):
        schedule = Schedule(groups, Share(index, count))
        busy: dict[int, tuple[int, int]] = {}
        while True:
            for worker in range(workers):
                if worker not in busy and (key := schedule.take(worker)) is not None:
                    busy[worker] = key
            if not busy:
                break
            worker = luck.choice(sorted(busy))
            key = busy.pop(worker)
            if luck.random() < 0.1:
                assert schedule.lost(worker) == [key]
                continue
            schedule.add(receipt(key, shape))
            if key[1] < shape[key[0]][1]:  # behind the end of a file there is nothing
                done.append(key)
        assert schedule.complete
    assert sorted(done) == [(g, p) for g, (_, pieces, _) in enumerate(shape) for p in range(pieces)]


def test_tasks_have_even_shares_of_one_file_of_unknown_length():
    share = Share(0, 7)
    share.prepare(groups_of([(1000, 10_000, False)]))
    counts = Counter(share.owner((0, piece)) for piece in range(10_000)).values()
    assert len(counts) == 7 and max(counts) - min(counts) < 10


def test_tasks_have_shares_by_size():
    groups = groups_of([(random.Random(n).randint(1, 1000), 1, True) for n in range(2000)])
    sizes = [0] * 9
    share = Share(0, 9)
    share.prepare(groups)
    for group in groups:
        sizes[share.owner((group.number, 0))] += group.bytes
    assert max(sizes) - min(sizes) <= 2 * 1000


def test_a_worker_stays_with_its_file_and_idle_ones_help():
    shape = [(100, 5, False), (900, 50, False)]
    schedule = Schedule(groups_of(shape), Share())
    assert [schedule.take("a"), schedule.take("b")] == [(0, 0), (1, 0)]
    for piece in range(4):
        schedule.add(receipt((0, piece), shape))
        assert schedule.take("a") == (0, piece + 1)
    schedule.add(receipt((0, 4), shape))
    assert schedule.take("a") == (1, 1), "its file is done: it helps with the larger rest"


def test_the_maximum_of_tokens_counts_the_pieces_in_front():
    shape = [(100, 10, True)]
    schedule = Schedule(groups_of(shape), Share(), max_tokens=25)
    taken = [schedule.take(worker) for worker in range(4)]
    for key in (taken[0], taken[2], taken[3]):
        schedule.add(receipt(key, shape, tokens=10))
    assert not schedule.complete
    assert schedule.take("next") is not None, "the second piece is missing, so the first ten tokens are all that count"
    schedule.add(receipt(taken[1], shape, tokens=10))
    assert schedule.take("more") is None
    assert schedule.overflow() == ((0, 2), 5)
    assert [r.piece for r in schedule.in_order()] == [0, 1, 2]


def test_handing_out_costs_the_same_for_any_number_of_groups():
    shape = [(100, 1, True)] * 20_000
    schedule = Schedule(groups_of(shape), Share(), max_tokens=10**9)
    busy = [schedule.take(worker) for worker in range(4)]
    with processor_time(10.0):
        while not schedule.complete:
            schedule.add(receipt(busy.pop(0), shape, tokens=1))
            if (key := schedule.take(len(busy))) is not None:
                busy.append(key)
    assert len(schedule.in_order()) == 20_000
