"""What a person is shown of progress, with and without a terminal."""

from __future__ import annotations

import io
import math
import sys

import pytest

from data_prep.terminal import ProgressBars, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (-5, "0 s"),
        (89.4, "89 s"),
        (90, "2 min"),
        (89 * 60, "89 min"),
        (90 * 60, "1 h 30 min"),
        (2 * 3600 + 300, "2 h 05 min"),
        (76 * 3600, "3 d 4 h"),
        (math.nan, "-"),
        (math.inf, "-"),
    ],
)
def test_durations_are_whole_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_without_a_terminal_a_line_is_told_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBars(every=3600) as bars:
        bar = bars.add("work", 10)
        for done in range(10):
            bars.update(bar, done)
            bars.tell(f"{done} of 10")
        bars.tell("10 of 10", now=True)
        bars.say("done\x1b[31m")
    assert capsys.readouterr().err.splitlines() == ["0 of 10", "10 of 10", "done\\x1b[31m"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_there_are_bars_and_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with ProgressBars(keep=True) as bars:
        bar = bars.add("work [red]", 10)
        bars.update(bar, 5, "loss [1.0]")
        bars.tell("never")
        bars.say("a line")
    shown = screen.getvalue()
    assert "work [red]" in shown and "loss [1.0]" in shown and "50 %" in shown and "a line" in shown
    assert "never" not in shown


def test_a_log_that_cannot_be_written_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    with ProgressBars() as bars:
        bars.say("lost")
