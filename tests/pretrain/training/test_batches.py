"""The batch of a step is a function of seed and position alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.training.batches import BatchReader, make_micro_batch, merge_ranges, rank_share, take_samples

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=6).map(
    lambda items: merge_ranges(tuple((first, first + size) for first, size in items))
)


@given(position=st.integers(0, 70), count=st.integers(0, 30), skipped=RANGES)
def test_samples_are_taken_in_order_without_the_skipped(
    position: int, count: int, skipped: tuple[tuple[int, int], ...]
) -> None:
    left_out = {number for first, last in skipped for number in range(first, last + 1)}
    expected: list[int] = []
    candidate = position
    while len(expected) < count:
        if candidate not in left_out:
            expected.append(candidate)
        candidate += 1
    samples, following = take_samples(position, count, skipped)
    assert list(samples) == expected
    assert following == (expected[-1] + 1 if expected else position)


@given(RANGES, RANGES)
def test_merged_ranges_cover_the_same_numbers(
    one: tuple[tuple[int, int], ...], other: tuple[tuple[int, int], ...]
) -> None:
    def numbers(ranges: tuple[tuple[int, int], ...]) -> set[int]:
        return {number for first, last in ranges for number in range(first, last + 1)}

    merged = merge_ranges(one, other)
    assert numbers(merged) == numbers(one) | numbers(other)
    assert all(last + 1 < first for (_, last), (first, _) in pairwise(merged))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_every_batch_without_overlap(world_size: int) -> None:
    shares = [rank_share(16, 2, rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    places = sorted(place for share in shares for part in share for place in part)
    assert places == list(range(16))


class Numbered:
    """Sample n is the window n, n+1, ..., n+4."""

    def sequence(self, sample: int) -> np.ndarray:
        return np.arange(sample, sample + 5, dtype=np.uint16)

    def drawn(self, samples: int) -> dict[str, int]:
        return {"numbers": samples}

    def epochs(self, samples: int) -> dict[str, float]:
        return {"numbers": 0.0}


def reader(rank: int, world_size: int, device: str = "cpu") -> BatchReader:
    return BatchReader(
        Numbered(), micro_batch=2, rank=rank, world_size=world_size, device=torch.device(device), end_of_document=None
    )


def test_all_world_sizes_read_the_same_samples_also_after_a_jump() -> None:
    skipped = ((3, 4),)
    for position in (0, 8, 100):  # 100 is not what was read ahead
        expected = sorted(take_samples(position, 8, skipped)[0])
        for world_size in (1, 2, 4):
            seen = []
            for rank in range(world_size):
                one = reader(rank, world_size)
                one.read(0, 8, skipped, 8)
                batch = one.read(position, 8, skipped, 8)
                seen += [int(row[0]) for micro in batch.micro_batches for row in micro.inputs_BT]
                one.close()
                assert batch.next_position == expected[-1] + 1
            assert sorted(seen) == expected


@pytest.mark.gpu
def test_a_gpu_gets_its_batches_while_it_computes() -> None:
    on_cpu, on_gpu = reader(0, 1), reader(0, 1, "cuda")
    position, wrong = 0, torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(20):
        expected, batch = on_cpu.read(position, 8, (), 8), on_gpu.read(position, 8, (), 8)
        torch.cuda._sleep(20_000_000)  # the next batch is read and copied while this one's step computes
        for there, here in zip(batch.micro_batches, expected.micro_batches, strict=True):
            assert there.inputs_BT.is_cuda
            wrong += (there.inputs_BT != here.inputs_BT.cuda()).sum() + (there.labels_BT != here.labels_BT.cuda()).sum()
        position = batch.next_position
    on_cpu.close()
    on_gpu.close()
    assert int(wrong) == 0


def test_labels_follow_their_inputs_and_documents_end_with_their_end_token() -> None:
    rows = [np.array([5, 0, 7, 8, 0, 9]), np.array([1, 2, 3, 4, 5, 6])]
    batch = make_micro_batch(rows, end_of_document=0)
    assert batch.inputs_BT.tolist() == [[5, 0, 7, 8, 0], [1, 2, 3, 4, 5]]
    assert batch.labels_BT.tolist() == [[0, 7, 8, 0, 9], [2, 3, 4, 5, 6]]
    assert batch.documents_BT is not None
    assert batch.documents_BT.tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]
    assert make_micro_batch(rows, None).documents_BT is None
