"""Every rank holds one connection to rank 0, over which ranks report their progress and say that they leave.

The others notice a rank whose process or node is gone, whatever they wait for: the kernel closes the connections of a
process that ends, and gives up one whose other side no longer answers. Collectives on GPUs may wait for such a rank for
ever.

A message is one line of JSON: the state of its sender. A connection begins with a secret that rank 0 hands out over the
process group, so that a program which merely finds the open port is turned away.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import socket
import time
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import torch.distributed as dist

from data_prep.plain_text import plain
from pretrain.errors import MeetingError
from pretrain.ranks.agreement import gather
from pretrain.ranks.environment import LOOPBACK, Ranks
from pretrain.ranks.rendezvous import listen

_MEET_SECONDS = 60.0
# Connections are admitted one at a time; each has this long to show the secret.
_INTRODUCTION_SECONDS = 2.0
_SECRET_BYTES, _RANK_BYTES = 32, 4
_LONGEST_TEXT = 200
# A node without power closes no connection. TCP probes it after 8 s of silence, every 4 s, 4 times; data that was sent
# must be confirmed within 24 s.
_LIVENESS = (("TCP_KEEPIDLE", 8), ("TCP_KEEPINTVL", 4), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 24_000))
_OPEN = "let the ranks' hosts reach one another on all TCP ports (firewall)."


class State(NamedTuple):
    """What a rank says of itself.

    Attributes:
        beats: how often it has moved on; doing: what it does now.
        stalled: whole seconds since it last moved, once they are too many; 0 before.
        leaving: it ends in good order; ending: rank 0 ends all ranks.
    """

    beats: int
    doing: str
    stalled: int = 0
    leaving: bool = False
    ending: bool = False


def write_state(state: State) -> bytes:
    """The state as one line."""
    return json.dumps(state._replace(doing=plain(state.doing)[:_LONGEST_TEXT])).encode() + b"\n"


def read_state(line: bytes) -> State | None:
    """The state that a line holds; None where it holds none."""
    try:
        beats, doing, stalled, leaving, ending = orjson.loads(line)
    except (ValueError, TypeError):
        return None
    state = State(beats, doing, stalled, leaving, ending)
    if [type(value) for value in state] != [int, str, int, bool, bool] or min(beats, stalled) < 0:
        return None
    return state._replace(doing=plain(doing)[:_LONGEST_TEXT])


class Lifelines:
    """This rank's connections: rank 0's to every other rank, any other rank's to rank 0. Collective.

    Attributes:
        hosts: the name of each rank's host.
        heard: the last state of each rank at the other ends, and when it came, by this process's monotonic clock.

    Raises:
        MeetingError: on all ranks alike, when one does not come into contact with rank 0.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._connections: dict[int, socket.socket] = {}
        self._unread: dict[int, bytes] = {}
        self._lost: dict[int, float] = {}
        self.heard: dict[int, tuple[State, float]] = {}
        networks = gather(_network())
        self.hosts: list[str] = [network[0] for network in networks]
        offer: list[Any] = [None]
        problem = None
        if ranks.rank == 0:
            secret = secrets.token_bytes(_SECRET_BYTES)
            address = LOOPBACK if len(set(networks)) == 1 else ranks.master_address
            try:
                listener = listen(address, 0, ranks.world_size + 64)
                offer = [(address, listener.getsockname()[1], secret)]
            except OSError as error:
                problem = f"rank 0 cannot listen for the other ranks ({error.strerror})."
        dist.broadcast_object_list(offer, src=0)
        if offer[0] is not None:
            problem = self._admit(listener, secret) if ranks.rank == 0 else self._connect(*offer[0])
        problems = [text for text in gather(problem) if text is not None]
        if problems:
            self.close(State(0, "", leaving=True))
            # Rank 0 only knows who is missing; the others know why.
            raise MeetingError(problems[-1])

    def tell(self, state: State) -> None:
        """Send this rank's state to every rank at another end. Never waits: what a connection cannot take is left out,
        and what arrives of it is no line of JSON. A failed connection shows when it is read.
        """
        line = b"\n" + write_state(state)
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.send(line)

    def listen(self) -> None:
        """Read what has come. Never waits."""
        for rank, connection in list(self._connections.items()):
            received = b"?"
            while received:
                try:
                    received = connection.recv(1 << 16)
                except BlockingIOError:
                    break
                except OSError:
                    received = b""
                self._read(rank, received)
            if not received:
                connection.close()
                del self._connections[rank]
                if rank not in self.heard or not self.heard[rank][0].leaving:
                    self._lost[rank] = time.monotonic()

    def lost(self) -> dict[int, float]:
        """Ranks whose connection ended although they did not say that they leave, and how many seconds ago `listen`
        noticed.
        """
        now = time.monotonic()
        return {rank: now - since for rank, since in self._lost.items()}

    def close(self, last: State | None = None) -> None:
        """End the connections. Without a `last` state that says `leaving` the others take this rank for lost."""
        if last is not None:
            self.tell(last)
        self.listen()  # closing a connection with unread data would discard what was sent last
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()

    def _read(self, rank: int, received: bytes) -> None:
        *lines, rest = (self._unread.get(rank, b"") + received).split(b"\n")
        self._unread[rank] = rest[-4096:]  # more than any line
        for state in map(read_state, lines):
            if state is not None:
                self.heard[rank] = (state, time.monotonic())

    def _hold(self, rank: int, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _LIVENESS:
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connections[rank] = connection

    def _connect(self, address: str, port: int, secret: bytes) -> str | None:
        """Come into contact with rank 0; what went wrong."""
        rank = self._ranks.rank
        try:
            connection = socket.create_connection((address, port), timeout=20.0)
            connection.sendall(secret + rank.to_bytes(_RANK_BYTES, "big"))
        except OSError as error:
            host = socket.gethostname()
            return f"rank {rank} on {host} cannot reach rank 0 at {address}:{port} ({error}); {_OPEN}"
        self._hold(0, connection)
        return None

    def _admit(self, listener: socket.socket, secret: bytes) -> str | None:
        """Hold the connections of all other ranks, and stop listening; what went wrong."""
        others = range(1, self._ranks.world_size)
        deadline = time.monotonic() + _MEET_SECONDS
        with listener:
            while len(self._connections) < len(others) and (left := deadline - time.monotonic()) > 0:
                listener.settimeout(left)
                try:
                    connection, _ = listener.accept()
                except (TimeoutError, ConnectionError):
                    continue
                except OSError as error:
                    held = f"{len(others)} connections ({error.strerror})"
                    return f"rank 0 cannot hold {held}; raise its limit of open files (ulimit -n)."
                rank = _introduction(connection, secret)
                if rank is not None and rank in others and rank not in self._connections:
                    self._hold(rank, connection)
                else:
                    connection.close()
        missing = [str(rank) for rank in others if rank not in self._connections]
        if not missing:
            return None
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        return f"rank 0 has not heard from rank {', '.join(missing[:8])}{more} in {_MEET_SECONDS:.0f} s; {_OPEN}"


def _introduction(connection: socket.socket, secret: bytes) -> int | None:
    """The rank that somebody who knows the secret says it is."""
    connection.settimeout(_INTRODUCTION_SECONDS)
    said, whole = b"", _SECRET_BYTES + _RANK_BYTES
    with contextlib.suppress(OSError):
        while len(said) < whole and (part := connection.recv(whole - len(said))):
            said += part
    if len(said) < whole or not hmac.compare_digest(said[:_SECRET_BYTES], secret):
        return None
    return int.from_bytes(said[_SECRET_BYTES:], "big")


def _network() -> tuple[str, ...]:
    """What is the same for ranks that reach one another by the loopback address: host, kernel, network namespace."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
        parts.append(os.readlink("/proc/self/ns/net"))
    return tuple(parts)
