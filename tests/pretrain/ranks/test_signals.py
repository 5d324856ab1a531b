"""Requests to stop: real signals to this and to other processes, files, and limits in time."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.errors import LaunchError
from pretrain.ranks.signals import EXIT_AGAIN, EXIT_FINISHED, EXIT_HELD, Request, StopRequest
from tests.pretrain.support import ROOT


def test_the_larger_request_wins_a_reduction_over_ranks():
    assert max(Request.NONE, Request.CHECKPOINT, Request.STOP, Request.HOLD) is Request.HOLD
    assert max(int(Request.CHECKPOINT), int(Request.STOP)) == Request.STOP
    assert [request.stops for request in Request] == [False, False, True, True]
    assert [request.exit_code for request in Request] == [EXIT_FINISHED, EXIT_FINISHED, EXIT_AGAIN, EXIT_HELD]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_asks_to_stop_and_names_itself(number):
    before = signal.getsignal(number)
    with StopRequest(environ={}) as stop:
        assert stop.poll() is Request.NONE
        os.kill(os.getpid(), number)
        assert stop.poll() is Request.STOP
        assert signal.Signals(number).name in stop.reason
        assert stop.poll() is Request.STOP, "a request does not go away by being asked for"
    assert signal.getsignal(number) is before


def test_files_ask_once_and_by_hand(tmp_path):
    with StopRequest(tmp_path, environ={}) as stop:
        (tmp_path / "checkpoint").touch()
        assert stop.poll() is Request.CHECKPOINT
        stop.acknowledge()
        assert stop.poll() is Request.NONE
        (tmp_path / "stop").touch()
        (tmp_path / "checkpoint").touch()
        assert stop.poll() is Request.HOLD
        stop.acknowledge()
        assert list(tmp_path.iterdir()) == []


def test_a_rank_that_does_not_watch_leaves_the_files_alone(tmp_path):
    (tmp_path / "stop").touch()
    with StopRequest(tmp_path, watch_files=False, environ={}) as stop:
        assert stop.poll() is Request.NONE
        stop.acknowledge()
    assert (tmp_path / "stop").exists()


def test_stopping_by_hand_outranks_a_signal(tmp_path):
    with StopRequest(tmp_path, environ={}) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        (tmp_path / "stop").touch()
        assert stop.poll() is Request.HOLD, "a person's stop must not be started again by a script"


def test_limits_in_time(monkeypatch):
    now = time.time()
    assert StopRequest(wall_clock=1000, reserve=10, environ={}).poll() is Request.NONE
    assert StopRequest(wall_clock=1000, reserve=1001, environ={}).poll() is Request.STOP
    late = StopRequest(reserve=60, environ={"SLURM_JOB_END_TIME": str(int(now + 3600))})
    assert late.poll() is Request.NONE
    late.reserve = 4000
    assert late.poll() is Request.STOP
    assert "Slurm" in late.reason


def test_a_limit_leaves_room_for_the_longest_step_and_for_a_checkpoint(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(
        "pretrain.ranks.signals.time", SimpleNamespace(monotonic=lambda: clock.now, time=lambda: clock.now)
    )
    stop = StopRequest(wall_clock=1000, reserve=100, environ={})

    def poll(after: float) -> Request:
        clock.now += after
        return stop.poll()

    # 100 s to the first poll are a start and no step; then an evaluation made one step of 300 s.
    assert [poll(100), poll(10), poll(300), poll(10)] == [Request.NONE] * 4
    assert poll(179) is Request.NONE and poll(1) is Request.STOP and clock.now == 1000 - 100 - 300
    assert stop.reason == "the wall-clock limit is near, and stopping may take 400 s"


@pytest.mark.parametrize(
    "arguments",
    [
        {"wall_clock": 0},
        {"wall_clock": -1},
        *({"environ": {"SLURM_JOB_END_TIME": text}} for text in ("soon", "nan", "inf", "1" * 5000)),
    ],
)
def test_limits_that_are_none(arguments):
    with pytest.raises(LaunchError):
        StopRequest(**{"environ": {}, **arguments})


# Locking a mutex twice never returns, not even for a signal: no Python handler runs, as in a collective that waits for
# a dead rank.
BLOCKED = """
import ctypes
from pretrain.ranks.signals import StopRequest
libc = ctypes.CDLL(None)
lock = ctypes.create_string_buffer(64)  # pthread_mutex_t
with StopRequest(debounce=0.0, environ={}):
    print("ready", flush=True)
    libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)
"""


def blocked_process():
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def deliver(process, number):
    """Send a signal and return when it has arrived: one that is sent meanwhile would be the same one."""
    process.send_signal(number)
    while process.poll() is None:
        (pending,) = re.findall(r"^ShdPnd:\s+(\w+)$", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
        if not int(pending, 16):
            return
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once(number):
    process = blocked_process()
    try:
        deliver(process, number)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        deliver(process, number)
        assert process.wait(120) == 128 + number
        assert "second time" in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def test_announcements_do_not_count_as_the_first_of_two():
    process = blocked_process()
    try:
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM):
            deliver(process, number)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.3)
        deliver(process, signal.SIGTERM)
        assert process.wait(120) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.communicate()


def test_a_request_made_after_the_last_look_stays(tmp_path: Path) -> None:
    """Somebody who wants the run to stop touches the file while the checkpoint that he asked for is being written."""
    stop = StopRequest(tmp_path, environ={})
    (tmp_path / "checkpoint").touch()
    assert stop.poll() is Request.CHECKPOINT
    (tmp_path / "stop").touch()
    stop.acknowledge()
    assert [entry.name for entry in tmp_path.iterdir()] == ["stop"] and stop.poll() is Request.HOLD


def test_a_request_that_cannot_be_removed_is_heeded_once(tmp_path: Path) -> None:
    stop = StopRequest(tmp_path, environ={})
    (tmp_path / "checkpoint").mkdir()
    assert stop.poll() is Request.CHECKPOINT
    stop.acknowledge()
    assert stop.poll() is Request.NONE


def test_a_file_system_that_hiccups_asks_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopRequest(tmp_path, environ={})

    def stale(*_: Any, **__: Any) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "stat", stale)
    assert stop.poll() is Request.NONE


@pytest.mark.parametrize(("handler", "asked"), [(signal.SIG_DFL, Request.STOP), (signal.SIG_IGN, Request.NONE)])
def test_a_terminal_that_is_closed_asks_to_stop_unless_nobody_minds(handler: Any, asked: Request) -> None:
    before = signal.signal(signal.SIGHUP, handler)
    try:
        with StopRequest(environ={}) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.poll() is asked
        assert signal.getsignal(signal.SIGHUP) is handler
    finally:
        signal.signal(signal.SIGHUP, before)


# Pools of libraries fork, and end their processes with SIGTERM.
FORKING = """
import os, signal
from pretrain.ranks.signals import Request, StopRequest
with StopRequest(debounce=0.0, environ={}) as stop:
    for _ in range(3):
        child = os.fork()
        if child == 0:
            signal.pause()
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert stop.poll() is Request.NONE
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.poll() is Request.STOP
print("done")
"""


def test_forked_processes_die_of_their_signals_and_do_not_pass_them_on() -> None:
    done = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr
