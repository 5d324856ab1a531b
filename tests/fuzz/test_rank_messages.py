"""States that ranks tell one another, changed on the way: what is read is one that a rank can have, or nothing."""

from __future__ import annotations

import random

from pretrain.ranks.lifelines import State, read_state, write_state
from tests.fuzz.support import ODD_TEXTS, counts, drive, mutate_bytes, mutate_json


def state(source: random.Random) -> State:
    text = "".join(source.choice(ODD_TEXTS) for _ in range(source.randrange(4)))
    return State(source.choice([0, 1, 2**63]), text, source.choice([0, 90]), source.random() < 0.5, False)


def unlike_a_state(given: object, read: State | None) -> str | None:
    fits = read is None or (read.beats >= 0 and read.stalled >= 0 and read.doing.isprintable())
    return None if fits and (read is None or len(read.doing) <= 200) else f"became {read}"


@counts
def test_changed_states(count: int) -> None:
    def make(source: random.Random) -> bytes:
        if source.random() < 0.5:
            return mutate_bytes(write_state(state(source)), source)
        return mutate_json(list(state(source)), source)

    drive(count, make, read_state, changed=unlike_a_state, used=1)


@counts
def test_whatever_a_rank_does_can_be_told(count: int) -> None:
    def unlike(given: State, read: State | None) -> str | None:
        return unlike_a_state(given, read) or (None if read and read[2:] == given[2:] else f"became {read}")

    drive(count, state, lambda given: read_state(write_state(given)), changed=unlike)
