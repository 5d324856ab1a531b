"""Connections between ranks that are threads, and strangers who come to rank 0's open port."""

from __future__ import annotations

import contextlib
import socket
import threading

import pytest

from pretrain.errors import MeetingError
from pretrain.ranks import lifelines as module
from pretrain.ranks.environment import Ranks
from pretrain.ranks.lifelines import Lifelines, State
from tests.pretrain.collectives import Threads

SECONDS = 60.0


class Meeting(Threads):
    """Ranks that come into contact; `door` is called with rank 0's address and port before any other rank connects."""

    def __init__(self, world_size, monkeypatch, door=lambda address, port: None):
        super().__init__(world_size, monkeypatch)
        self.world_size, self.door, self.place = world_size, door, None

    def _broadcast(self, values, src):
        super()._broadcast(values, src)
        if values[0] is not None and self.rank != 0:
            self.place = values[0][:2]
            if self.rank == 1:
                self.door(*self.place)

    def connect(self):
        return self.each(lambda rank: Lifelines(Ranks(rank, self.world_size, 0, 1, 0, "127.0.0.3", 1, "python")))


def listen_until(lines, enough):
    for _ in range(10_000):
        lines.listen()
        if enough():
            return
        threading.Event().wait(0.005)
    raise AssertionError("not heard")


def test_ranks_say_what_they_do_and_how_they_leave(monkeypatch):
    first, *others = Meeting(4, monkeypatch).connect()
    told = {rank: State(10 * rank, f"step {rank}", stalled=90 if rank == 3 else 0) for rank in (1, 2, 3)}
    for rank, other in enumerate(others, 1):
        other.tell(told[rank])
    listen_until(first, lambda: len(first.heard) == 3)
    assert {rank: state for rank, (state, _) in first.heard.items()} == told
    others[0].close(State(11, "closing", leaving=True))
    others[1].close()
    listen_until(first, lambda: first.lost() and first.heard[1][0].leaving)
    first.listen()
    assert list(first.lost()) == [2], "rank 1 said that it leaves"
    first.tell(State(5, "step 5", ending=True))
    first.close()
    listen_until(others[2], others[2].lost)
    assert others[2].heard[0][0].ending and list(others[2].lost()) == [0]
    others[2].close()


def test_a_rank_that_does_not_read_delays_nobody_and_hears_the_end_once_it_does(monkeypatch):
    first, other = Meeting(2, monkeypatch).connect()
    first._connections[1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    last = 20_000
    for beat in range(last):  # more than the buffers of the connection hold
        first.tell(State(beat, "x" * 200))
    other.listen()
    assert 0 < other.heard[0][0].beats < last - 1, "what it did not take is left out"
    first.tell(State(7, "step 7", ending=True))
    listen_until(other, lambda: other.heard[0][0].ending)
    for lines in (first, other):
        lines.close()


def test_a_stranger_is_turned_away_and_nothing_listens_once_all_are_there(monkeypatch):
    monkeypatch.setattr(module, "_INTRODUCTION_SECONDS", 1.0)
    strangers = []

    def door(address, port):
        assert address == "127.0.0.1", "all ranks are on this host"
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.2", port), timeout=SECONDS)
        for words in (b"GET / HTTP/1.1\r\n\r\n" * 9, b"a guess!" * 4 + b"\0\0\0\1", b"\xff" * 5000, b""):
            strangers.append(socket.create_connection((address, port), timeout=SECONDS))
            strangers[-1].sendall(words)

    meeting = Meeting(3, monkeypatch, door)
    lines = meeting.connect()
    for stranger in strangers:
        stranger.settimeout(SECONDS)
        with contextlib.suppress(ConnectionError):
            assert stranger.recv(1) == b""
        stranger.close()
    with pytest.raises(ConnectionError):
        socket.create_connection(meeting.place, timeout=SECONDS)
    for line in lines:
        line.listen()
        assert line.lost() == {} and line.heard == {}
    for line in lines:
        line.close(State(0, "", leaving=True))


def test_ranks_that_do_not_come_into_contact_are_named_on_all_ranks(monkeypatch):
    monkeypatch.setattr(module, "_MEET_SECONDS", 0.2)
    connect, meeting = socket.create_connection, Meeting(3, monkeypatch)

    def blocked(address, **options):
        if meeting.rank == 2:
            raise ConnectionRefusedError(111, "Connection refused")
        return connect(address, **options)

    monkeypatch.setattr(module.socket, "create_connection", blocked)
    outcomes = meeting.connect()
    assert all(isinstance(outcome, MeetingError) for outcome in outcomes), outcomes
    assert len({str(outcome) for outcome in outcomes}) == 1
    assert "cannot reach rank 0 at 127.0.0.1:" in str(outcomes[0]) and "Connection refused" in str(outcomes[0])


def test_ranks_on_several_hosts_meet_at_the_masters_address(monkeypatch):
    meeting = Meeting(3, monkeypatch)
    monkeypatch.setattr(module, "_network", lambda: (f"host {meeting.rank}",))
    lines = meeting.connect()
    assert meeting.place[0] == "127.0.0.3" and lines[0].hosts == ["host 0", "host 1", "host 2"]
    for line in lines:
        line.close(State(0, "", leaving=True))
