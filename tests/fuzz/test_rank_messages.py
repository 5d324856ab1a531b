"""States that ranks tell one another, changed on the way: what is read is one that a rank can have, or nothing."""

from __future__ import annotations

import random

from pretrain.ranks.lifelines import State, read_state, write_state
from tests.fuzz.support import ODD_TEXTS, counts, drive, mutate_bytes, mutate_json


def state(source: random.Random) -> State:
    text = "".join(source.choice(ODD_TEXTS) for _ in range(source.randrange(4)))
    return State(source.choice([0, 1, 2**63]), text, source.choice([0, 90]), source.random() < 0.5, False)


def changed(given: bytes | State, read: State | None) -> str | None:
    """States that nobody changed keep their numbers, whatever a rank does."""
    if isinstance(given, State):
        fits = read is not None and read[2:] == given[2:]
    else:
        fits = read is None or min(read.beats, read.stalled) >= 0
    shown = read is None or (read.doing.isprintable() and len(read.doing) <= 200)
    return None if fits and shown else f"became {read}"


@counts
def test_states(count: int) -> None:
    def make(source: random.Random) -> bytes | State:
        given = state(source)
        match source.randrange(3):
            case 0:
                return given
            case 1:
                return mutate_bytes(write_state(given), source)
        return mutate_json(list(given), source)

    def use(given: bytes | State) -> State | None:
        return read_state(write_state(given) if isinstance(given, State) else given)

    drive(count, make, use, changed=changed, used=1)
