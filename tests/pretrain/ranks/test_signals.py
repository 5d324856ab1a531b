"""Requests to stop: real signals to this and to other processes, files, and limits in time."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.errors import LaunchError
from pretrain.ranks.signals import EXIT_AGAIN, EXIT_HELD, Request, StopRequest
from tests.pretrain.support import ROOT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_asks_to_stop_and_names_itself(number):
    before = signal.getsignal(number)
    with StopRequest(environ={}) as stop:
        assert stop.poll() is Request.NONE
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # launchers repeat a terminal's Ctrl-C
        assert stop.poll() is Request.STOP
        assert signal.Signals(number).name in stop.reason
        request = stop.poll()
        assert request is Request.STOP and request.stops and request.exit_code == EXIT_AGAIN
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("handler", "asked"), [(signal.SIG_DFL, Request.STOP), (signal.SIG_IGN, Request.NONE)])
def test_a_terminal_that_is_closed_asks_to_stop_unless_it_is_ignored(handler: Any, asked: Request) -> None:
    before = signal.signal(signal.SIGHUP, handler)
    try:
        with StopRequest(environ={}) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.poll() is asked
        assert signal.getsignal(signal.SIGHUP) is handler
    finally:
        signal.signal(signal.SIGHUP, before)


# Libraries' pools fork, and end their processes with SIGTERM.
PROGRAM = """
import os, signal, time
from pretrain.ranks import signals
signals._REPEATED_SECONDS = 0.0
with signals.StopRequest(environ={}) as stop:
    started, start = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(start, b"x")
        while True:
            time.sleep(0.01)
    os.read(started, 1)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert stop.poll() is signals.Request.NONE
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR1, signal.SIGINT):
        os.kill(os.getpid(), number)
    assert stop.poll() is signals.Request.STOP
    print("asked", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("went on", flush=True)
"""


def test_a_second_signal_ends_the_process_and_neither_announcements_nor_forks_count() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 128 + signal.SIGTERM and done.stdout == "asked\n", done.stderr
    assert "SIGTERM a second time" in done.stderr


@pytest.mark.parametrize("removable", [True, False])
def test_a_checkpoint_is_asked_for_once(tmp_path: Path, removable: bool) -> None:
    stop, file = StopRequest(tmp_path, environ={}), tmp_path / "checkpoint"
    file.touch() if removable else file.mkdir()
    assert stop.poll() is Request.CHECKPOINT and not Request.CHECKPOINT.stops
    stop.acknowledge()
    assert stop.poll() is Request.NONE


def test_stopping_by_hand_outranks_a_signal_and_is_not_forgotten(tmp_path: Path) -> None:
    """A person's stop must not be started again by a script. It may come while a requested checkpoint is written."""
    with StopRequest(tmp_path, environ={}) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        (tmp_path / "checkpoint").touch()
        assert stop.poll() is Request.STOP
        (tmp_path / "stop").touch()
        stop.acknowledge()
        request = stop.poll()
        assert request is Request.HOLD and request.stops and request.exit_code == EXIT_HELD
        stop.acknowledge()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_hiccups_asks_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopRequest(tmp_path, environ={})

    def stale(*_: Any, **__: Any) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "stat", stale)
    assert stop.poll() is Request.NONE


def test_the_end_of_a_slurm_job_is_a_limit():
    late = StopRequest(environ={"SLURM_JOB_END_TIME": str(int(time.time() + 3600))})
    assert late.poll() is Request.NONE
    late.reserve = 4000
    assert late.poll() is Request.STOP
    assert "Slurm" in late.reason


def test_a_limit_leaves_room_for_the_longest_step_and_for_a_checkpoint(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(
        "pretrain.ranks.signals.time", SimpleNamespace(monotonic=lambda: clock.now, time=lambda: clock.now)
    )
    stop = StopRequest(wall_clock=1000, environ={})
    stop.reserve = 100

    def poll(after: float) -> Request:
        clock.now += after
        return stop.poll()

    # 100 s to the first poll are a start and no step; then an evaluation made one step of 300 s.
    assert [poll(100), poll(10), poll(300), poll(10)] == [Request.NONE] * 4
    assert poll(179) is Request.NONE and poll(1) is Request.STOP and clock.now == 1000 - 100 - 300
    assert stop.reason == "the wall-clock limit is near, and stopping may take 400 s"


@pytest.mark.parametrize("text", ["soon", "nan", "inf", "1" * 5000])
def test_an_unreadable_end_of_a_job_is_refused(text):
    with pytest.raises(LaunchError):
        StopRequest(environ={"SLURM_JOB_END_TIME": text})
