"""Connections between ranks that are threads, and strangers at rank 0's door."""

from __future__ import annotations

import contextlib
import socket
import threading

import pytest

from pretrain.errors import MeetingError
from pretrain.ranks import lifelines as module
from pretrain.ranks.environment import Ranks
from pretrain.ranks.lifelines import Lifelines
from pretrain.ranks.rank_messages import Channel, Kind, Message
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
        return self.each(
            lambda rank: Lifelines(Ranks(rank, self.world_size, 0, 1, 0, "127.0.0.1", 1, "python")),
        )


def heard_by(listener, enough):
    """Listen until `enough()`; what was said beside beats and goodbyes."""
    news = []
    for _ in range(10_000):
        news += listener.listen()
        if enough():
            return news
        threading.Event().wait(0.005)
    raise AssertionError("not heard")


def test_ranks_tell_what_they_do_and_how_they_leave(monkeypatch):
    first, *others = Meeting(4, monkeypatch).connect()
    for number, other in enumerate(others, 1):
        other.tell(Message(Kind.BEAT, 10 * number, doing=f"step {number}"))
    heard_by(first, lambda: len(first.heard) == 3)
    assert {rank: message[1:] for rank, (message, _) in first.heard.items()} == {
        rank: (10 * rank, 0, f"step {rank}") for rank in (1, 2, 3)
    }
    others[2].tell(Message(Kind.STALLED, seconds=90))
    others[0].close(goodbye=True)
    others[1].close(goodbye=False)
    news = heard_by(first, lambda: first.lost())
    news += first.listen()
    assert list(first.lost()) == [2], "rank 1 said goodbye"
    assert news == [(3, Message(Kind.STALLED, seconds=90))]
    first.tell(Message(Kind.END))
    first.close(goodbye=False)
    assert heard_by(others[2], others[2].lost) == [(0, Message(Kind.END))]
    assert list(others[2].lost()) == [0]
    others[2].close(goodbye=False)


def test_a_strangers_word_is_not_heeded_and_nothing_listens_once_all_are_there(monkeypatch):
    strangers = []

    def door(address, port):
        forged = Channel(b"a guess" * 4, 1, 0, 3).seal(Message(Kind.BEAT, doing="start"))
        assert address == "127.0.0.1", "all ranks are on this host"
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.2", port), timeout=SECONDS)
        for words in (b"GET / HTTP/1.1\r\n\r\n", forged, forged[:9], b"\xff" * 5000, b"", forged * 50):
            strangers.append(socket.create_connection((address, port), timeout=SECONDS))
            strangers[-1].sendall(words)

    meeting = Meeting(3, monkeypatch, door)
    first, *others = meeting.connect()
    for stranger in strangers:
        stranger.settimeout(SECONDS)
        with contextlib.suppress(ConnectionError):
            assert stranger.recv(1) == b""
        stranger.close()
    with pytest.raises(ConnectionError):
        socket.create_connection(meeting.place, timeout=SECONDS)
    for line in (first, *others):
        assert line.listen() == [] and line.lost() == {} and line.heard == {}
        line.close(goodbye=True)


def test_only_so_many_strangers_are_held(monkeypatch):
    turned_away = []

    def door(address, port):
        strangers = [socket.create_connection((address, port), timeout=SECONDS) for _ in range(100)]
        # Rank 1 has not come yet, and the oldest are gone already.
        turned_away.append(strangers[0].recv(1))
        for stranger in strangers:
            stranger.close()

    for line in Meeting(2, monkeypatch, door).connect():
        line.close(goodbye=True)
    assert turned_away == [b""]


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


@pytest.mark.parametrize(
    ("seen_elsewhere", "bound"),
    [
        ([["127.0.0.3"], ["127.0.0.3", "127.0.0.4"]], "127.0.0.3"),  # not what this host takes its own name for
        ([["127.0.0.3"], ["127.0.0.4"]], None),  # in two networks
        ([["192.0.2.1"], ["192.0.2.1"]], None),  # translated on the way
    ],
)
def test_rank_0_listens_where_the_other_hosts_reach_it(monkeypatch, seen_elsewhere, bound):
    rank = threading.local()
    monkeypatch.setattr(module, "_network", lambda: (f"host {rank.number}",))
    monkeypatch.setattr(module, "_addresses", lambda name: [["127.0.1.1"], *seen_elsewhere][rank.number])
    meeting = Meeting(3, monkeypatch)
    place = {}
    listen = module.listen

    def noted(address, port, backlog):
        place["listener"] = listener = listen(address, port, backlog)
        place["bound"] = listener.getsockname()[0]
        return listener

    def connect(number):
        rank.number = number
        return Lifelines(Ranks(number, 3, 0, 1, 0, "127.0.0.1", 1, "python"))

    monkeypatch.setattr(module, "listen", noted)
    lines = meeting.each(connect)
    assert place["bound"] == bound if bound else place["bound"] in ("::", "0.0.0.0")
    assert meeting.place[0] == (bound or "127.0.0.1")
    for line in lines:
        line.close(goodbye=True)
