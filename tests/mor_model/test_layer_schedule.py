"""Layer schedules against the paper's formulas, applied step by step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor_model.errors import ConfigError
from mor_model.layer_schedule import SHARING_STRATEGIES, layer_schedule, valid_depth

SHARED = [name for name in SHARING_STRATEGIES if name != "none"]


def stored_layer_at(step: int, depth: int, recursions: int, sharing: str) -> int:
    """The paper's table of sharing strategies, for one layer application."""
    if sharing == "cycle":
        return step % (depth // recursions)
    if sharing == "sequence":
        return step // recursions
    block = (depth - 2) // recursions
    if step == 0:
        return 0
    if step == depth - 1:
        return block + 1
    return (step - 1) % block + 1 if sharing == "middle_cycle" else (step - 1) // recursions + 1


@given(sharing=st.sampled_from(SHARED), recursions=st.integers(1, 6), block=st.integers(1, 7))
def test_every_application_runs_the_layer_of_the_formula(sharing, recursions, block):
    depth = block * recursions + (2 if sharing.startswith("middle_") else 0)
    schedule = layer_schedule(depth, recursions, sharing)
    assert list(schedule.applications) == [stored_layer_at(i, depth, recursions, sharing) for i in range(depth)]
    assert schedule.recursions == recursions
    assert schedule.num_stored == len(set(schedule.applications)) == max(schedule.applications) + 1
    assert {len(step) for step in schedule.steps} == {block}


@pytest.mark.parametrize("sharing", SHARED)
def test_only_cycles_repeat_the_same_layers_at_every_step(sharing):
    depth = 12 + (2 if sharing.startswith("middle_") else 0)
    assert layer_schedule(depth, 3, sharing).steps_share_layers == sharing.endswith("cycle")


def test_a_vanilla_schedule_is_one_step_of_distinct_layers():
    schedule = layer_schedule(5, 1, "none")
    assert schedule.applications == (0, 1, 2, 3, 4)
    assert (schedule.prelude, schedule.coda, schedule.num_stored) == ((), (), 5)


@pytest.mark.parametrize(
    ("depth", "recursions", "sharing", "nearest"),
    [
        (30, 3, "middle_cycle", "29 and 32"),
        (32, 4, "middle_sequence", "30 and 34"),
        (10, 4, "cycle", "8 and 12"),
        (7, 3, "sequence", "6 and 9"),
        (3, 4, "cycle", "4"),
        (2, 3, "middle_cycle", "5"),
    ],
)
def test_an_indivisible_depth_is_refused_with_the_nearest_valid_ones(depth, recursions, sharing, nearest):
    with pytest.raises(ConfigError, match=f"nearest valid depths are {nearest}\\.$"):
        layer_schedule(depth, recursions, sharing)
    for valid in map(int, nearest.split(" and ")):
        layer_schedule(valid, recursions, sharing)


@given(at_least=st.integers(1, 60), recursions=st.integers(1, 6), sharing=st.sampled_from(SHARED))
def test_valid_depth_is_the_smallest_that_can_be_divided(at_least, recursions, sharing):
    def possible(depth: int) -> bool:
        try:
            layer_schedule(depth, recursions, sharing)
        except ConfigError:
            return False
        return True

    depth = valid_depth(at_least, recursions, sharing)
    assert depth >= at_least
    assert possible(depth)
    assert not any(possible(smaller) for smaller in range(at_least, depth))
