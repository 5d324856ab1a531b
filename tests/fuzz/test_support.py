"""The fuzzing itself can fail: on a foreign exception, a hang, a silent change, a message that says nothing."""

from __future__ import annotations

import random

import pytest

from pretrain.errors import UserError
from tests.fuzz import support
from tests.fuzz.support import drive


def number(source: random.Random) -> int:
    return source.randrange(100)


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


@pytest.mark.parametrize(("use", "reason"), [(crash, "KeyError"), (hang, "Hang"), (say_nothing, "says nothing")])
def test_a_fault_is_named(use, reason, monkeypatch):
    monkeypatch.setattr(support, "LIMIT_SECONDS", 0.2)
    with pytest.raises(AssertionError, match=rf"input 0: .*{reason}"):
        drive(1, number, use)


def test_silent_changes_and_missed_shares_are_faults():
    def use(given: int) -> int:
        if given < 50:
            raise UserError("must be at least 50")
        return given

    drive(200, number, use, changed=lambda given, found: None if given == found else "another number", used=0.3)
    with pytest.raises(AssertionError, match="was changed silently: rounded"):
        drive(200, number, use, changed=lambda given, found: "rounded")
    with pytest.raises(AssertionError, match=r"^[89]\d of 200 were refused"):
        drive(200, number, use, refused=0.9)
