"""The fuzzing itself can fail: on a foreign exception, a hang, a silent change, a message that says nothing."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pretrain.errors import UserError
from tests.fuzz import support
from tests.fuzz.support import drive, mutate_bytes, mutate_text, mutate_value


def number(source: random.Random) -> int:
    return source.randrange(100)


def test_too_few_inputs_that_are_used_or_refused_are_a_fault() -> None:
    def use(given: int) -> int:
        if given < 50:
            raise UserError("must be at least 50")
        return given

    drive(200, number, use, changed=lambda given, found: None if given == found else "another number", used=0.3)
    with pytest.raises(AssertionError, match=r"^[89]\d of 200 were refused"):
        drive(200, number, use, refused=0.9)


def test_foreign_exceptions_hangs_changes_and_empty_messages_are_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "LIMIT_SECONDS", 0.2)

    def crash(given: int) -> None:
        raise KeyError(given)

    def hang(given: int) -> None:
        while True:
            try:
                sum(range(1000))
            except Exception:
                continue

    def say_nothing(given: int) -> None:
        raise UserError("")

    for use, reason in ((crash, "KeyError"), (hang, "Hang"), (say_nothing, "says nothing")):
        with pytest.raises(AssertionError, match=rf"input 0: .*{reason}"):
            drive(1, number, use)
    with pytest.raises(AssertionError, match="input 0 was changed silently: rounded"):
        drive(1, number, lambda given: given, changed=lambda given, found: "rounded")


@pytest.mark.parametrize(
    "mutate, original",
    [(mutate_value, {"a": [1, {"b": "c"}], "d": None}), (mutate_text, "a: [1, 2]\n"), (mutate_bytes, b"\x00" * 64)],
)
def test_mutations_depend_on_the_seed_alone_and_leave_the_original(mutate: Any, original: Any) -> None:
    before = repr(original)
    made = [repr(mutate(original, random.Random(seed))) for seed in range(200)]
    assert made == [repr(mutate(original, random.Random(seed))) for seed in range(200)]
    assert len(set(made)) > 50 and repr(original) == before
