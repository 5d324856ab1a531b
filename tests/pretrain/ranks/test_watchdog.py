"""A stalled, a frozen, a locked-up and a dead rank, in real processes."""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import threading

import pytest

from pretrain.errors import LaunchError, RunError
from pretrain.ranks import watchdog as module
from pretrain.ranks.environment import Ranks
from pretrain.ranks.signals import EXIT_STALLED
from pretrain.ranks.watchdog import Watchdog
from tests.ports import free_port
from tests.pretrain.collectives import Threads
from tests.pretrain.support import ALONE

RANK_PROGRAM = """
import ctypes, os, signal, sys, threading, time
import torch
import torch.distributed as dist
from pretrain.ranks import watchdog as module
from pretrain.ranks.environment import prepare_environment
from pretrain.ranks.watchdog import Watchdog

def stuck_in_the_data_loader():
    threading.Event().wait()

def frozen():
    os.kill(os.getpid(), signal.SIGSTOP)

def holding_the_interpreter():
    ctypes.PyDLL(None).sleep(600)

def killed():
    os.kill(os.getpid(), signal.SIGKILL)

def leaving_with_an_error():
    raise KeyError("on one rank alone")

folder, how, culprit, timeout = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
ranks = prepare_environment()
if ranks.world_size > 1:
    dist.init_process_group("gloo")
if ranks.rank == 2:
    clock = time.time
    time.time = lambda: clock() + 60  # this node's clock is a minute off
with Watchdog(folder, ranks, timeout=timeout) as watchdog:
    for step in range(3):
        watchdog.beat(f"step {step}: data")
        if step == 1 and ranks.rank == culprit and how in globals():
            globals()[how]()
        if step == 1 and how in ("killed", "leaving_with_an_error"):
            module._GONE_SECONDS = 1.0
            watchdog.beat("a collective that notices nothing", allow=600)
            threading.Event().wait()
        time.sleep(timeout / 4)
        watchdog.beat(f"step {step}: forward")
        if ranks.world_size > 1:
            dist.all_reduce(torch.ones(1))
    watchdog.beat("evaluation", allow=60)
    time.sleep(1.25 * timeout)
print("FINISHED", flush=True)
sys.exit(0)
"""


@pytest.fixture
def start(tmp_path, nursery):
    started = []

    def start(how, culprit, world_size, timeout=1.0):
        script = tmp_path / "rank.py"
        script.write_text(RANK_PROGRAM)
        place = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        arguments = [str(tmp_path / "stacks"), how, str(culprit), str(timeout)]
        for rank in range(world_size):
            started.append(nursery.start(script, arguments, {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
        return started

    yield start
    for process in started:
        process.kill()


def finish(processes):
    """Exit codes and outputs."""
    printed = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, printed)]


def incident(tmp_path):
    (folder,) = (tmp_path / "stacks").iterdir()  # one alarm makes one folder
    return folder


def test_a_run_that_moves_is_left_alone(tmp_path, start):
    # Longer than a busy machine lets a process wait for its turn.
    results = finish(start("nothing", 0, 2, timeout=3.0))
    assert [(code, output) for code, output, _ in results] == [(0, "FINISHED\n")] * 2, results
    assert list((tmp_path / "stacks").iterdir()) == []


def test_the_rank_the_others_wait_for_is_named(tmp_path, start):
    results = finish(start("stuck_in_the_data_loader", 1, 3))
    assert [code for code, _, _ in results] == [EXIT_STALLED] * 3, results
    assert sum("has stopped moving" in errors for _, _, errors in results) == 1
    report = (incident(tmp_path) / "report.txt").read_text()
    assert "rank 1 on" in report and "the others wait for it" in report and "step 1: data" in report
    assert "rank 0 on" not in report and "rank 2 on" not in report
    stacks = [(incident(tmp_path) / f"rank-{rank:05d}.txt").read_text() for rank in range(3)]
    assert "stuck_in_the_data_loader" in stacks[1]
    assert "all_reduce" in stacks[0] and "all_reduce" in stacks[2]


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_frozen_process_is_named_and_the_others_end(culprit, start):
    other = start("frozen", culprit, 2, timeout=3.0)[1 - culprit]
    ((code, _, errors),) = finish([other])
    assert code == EXIT_STALLED and f"rank {culprit}" in errors and "no longer answers" in errors, errors


@pytest.mark.parametrize(
    ("how", "culprit"),
    [
        ("killed", 1),
        pytest.param("killed", 0, marks=pytest.mark.slow),
        pytest.param("leaving_with_an_error", 1, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_is_gone_ends_the_others_whatever_they_wait_for(tmp_path, how, culprit, start):
    """Long before the 600 seconds that they may take, and within collectives that would wait for ever."""
    results = finish(start(how, culprit, 3))
    others = [result for rank, result in enumerate(results) if rank != culprit]
    assert [code for code, _, _ in others] == [EXIT_STALLED] * 2, results
    report = next(errors for _, _, errors in others if "are gone" in errors)
    assert f"rank {culprit} " in report and "rank 2" not in report
    stack = next((tmp_path / "stacks").glob("*/rank-00002.txt")).read_text()
    assert "a collective that notices nothing" in stack


def test_one_process_alone(tmp_path, start):
    ((code, _, errors),) = finish(start("stuck_in_the_data_loader", 0, 1))
    assert code == EXIT_STALLED, errors
    assert "stuck_in_the_data_loader" in (incident(tmp_path) / "rank-00000.txt").read_text()


def test_a_rank_that_keeps_the_interpreter_to_itself_still_ends_with_its_stack(start):
    ((code, _, errors),) = finish(start("holding_the_interpreter", 0, 1))
    assert code == 1
    assert "holding_the_interpreter" in errors


def test_a_watchdog_that_fails_says_so_and_takes_back_what_would_end_the_run(tmp_path, monkeypatch, capsys):
    """faulthandler is armed at each look; a stand-in tells whether it still is."""
    armed, disarmed = threading.Event(), threading.Event()

    def arm(*_, **__):
        if armed.is_set():
            raise ValueError("I/O operation on closed file")
        armed.set()

    def disarm():
        armed.clear()
        disarmed.set()

    monkeypatch.setattr(faulthandler, "dump_traceback_later", arm)
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", disarm)
    with Watchdog(tmp_path, ALONE, timeout=1.0):
        assert disarmed.wait(60) and not armed.is_set()
    said = capsys.readouterr().err
    assert "rank 0: the watchdog has failed" in said and "closed file" in said


def test_a_folder_that_one_rank_cannot_make_is_named_on_all(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    place = Ranks(0, 2, 0, 1, 0, "127.0.0.1", 1, "python")

    def rank(number):
        folder = tmp_path / ("file" if number else "stacks")
        with Watchdog(folder, dataclasses.replace(place, rank=number), timeout=1.0):
            return None

    outcomes = Threads(2, monkeypatch).each(rank)
    assert all(isinstance(error, LaunchError) and f"{tmp_path / 'file'}: cannot" in str(error) for error in outcomes)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("alone", [False, True])
def test_a_rank_that_waits_for_nobody_outlives_the_others(tmp_path, monkeypatch, capsys, alone):
    """All ranks meet one error, and the last checkpoint is still being written on one of them."""
    looks, ended = threading.Semaphore(0), threading.Event()

    def end(code):
        ended.set()
        raise SystemExit(code)  # of the watchdog's thread

    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **__: looks.release())
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(module, "_GONE_SECONDS", 0.0)
    threads, other_is_gone = Threads(2, monkeypatch), threading.Event()

    def rank(number):
        place = Ranks(number, 2, number, 2, number, "127.0.0.1", 1, "python")
        try:
            with Watchdog(tmp_path, place, timeout=1.0) as watchdog:
                watchdog.beat("closing", allow=1000, alone=alone)
                if number == 1:
                    raise RunError("an error on all ranks")
                assert other_is_gone.wait(60)
                while looks.acquire(blocking=False):
                    pass
                if not alone:
                    assert ended.wait(60)
                for _ in range(4 if alone else 0):
                    assert looks.acquire(timeout=60)
                return ended.is_set()
        finally:
            other_is_gone.set()

    outcomes = threads.each(rank)
    assert isinstance(outcomes[1], RunError) and outcomes[0] is not alone, outcomes
    assert ("rank 1 on" in capsys.readouterr().err) is not alone
