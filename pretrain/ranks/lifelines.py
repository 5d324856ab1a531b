"""Every rank holds one connection to rank 0, over which they tell one another how far they are and that they leave.

A rank whose process or node is gone is noticed by the others, whatever they wait for: the kernel closes the connections
of a process that ends, and gives one up whose other side no longer answers. Collectives on GPUs need not notice by
themselves: they wait for a rank that will never come.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.errors import MeetingError
from pretrain.ranks.environment import LOOPBACK, Ranks
from pretrain.ranks.rank_messages import BadMessage, Channel, Kind, Message
from pretrain.ranks.rendezvous import listen

_MEET_SECONDS = 60.0
_CONNECT_SECONDS = 20.0
# So many connections that have not yet shown the secret are held beside those of the ranks; the oldest goes first.
_STRANGERS = 64
# A node without power says nothing: after so many seconds of silence it is asked, in such distances, so often; and so
# many milliseconds may pass until it confirms what it was sent.
_LIVENESS = (("TCP_KEEPIDLE", 8), ("TCP_KEEPINTVL", 4), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 24_000))

_OPEN = "let the ranks' hosts reach one another on all TCP ports (firewall)."


@dataclass
class _Line:
    connection: socket.socket
    channel: Channel
    unsent: bytes = b""
    left: bool = False  # the other side has said goodbye
    deaf: bool = False  # the other side has said what no rank says: nothing more is read


class Lifelines:
    """This rank's connections. Made by all ranks together, once the process group exists.

    Attributes:
        hosts: the name of each rank's host.
        heard: the last beat of each rank at the other ends, and when it came, by this process's monotonic clock.

    Raises:
        MeetingError: on all ranks alike, when one does not come into contact with rank 0.
    """

    def __init__(self, ranks: Ranks) -> None:
        import torch.distributed as dist

        self._ranks = ranks
        self._selector = selectors.DefaultSelector()
        self._lines: dict[int, _Line] = {}
        self._lost: dict[int, float] = {}
        self.heard: dict[int, tuple[Message, float]] = {}
        places: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(places, (socket.gethostname(), _network(), _addresses(ranks.master_address)))
        self.hosts: list[str] = [name for name, _, _ in places]
        offer: list[Any] = [None]
        problem = None
        listener = None
        if ranks.rank == 0:
            secret = secrets.token_bytes(32)
            try:
                listener, address = _listen_to(places, ranks)
                offer = [(address, listener.getsockname()[1], secret)]
            except OSError as error:
                problem = f"rank 0 cannot listen for the other ranks ({error.strerror})."
        dist.broadcast_object_list(offer, src=0)
        if offer[0] is not None:
            problem = self._connect(*offer[0]) if listener is None else self._admit(listener, secret)
        problems: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(problems, problem)
        said = [text for text in problems if text is not None]
        if said:
            self.close(goodbye=True)
            # Rank 0 only knows who is missing; the others know why.
            raise MeetingError(said[-1])

    def tell(self, message: Message) -> None:
        """Send a message to every rank at another end. Never waits: a beat is left out where earlier ones lie."""
        for line in self._lines.values():
            self._send(line)
            if not line.unsent or message.kind is not Kind.BEAT:
                line.unsent += line.channel.seal(message)
                self._send(line)

    def listen(self) -> list[tuple[int, Message]]:
        """Read what has come: what is neither a beat nor a goodbye, with its sender. Never waits."""
        news = []
        for key, _ in self._selector.select(0):
            rank, line = key.data, self._lines[key.data]
            try:
                received = line.connection.recv(1 << 16)
            except BlockingIOError:
                continue
            except OSError:
                received = b""
            if not received:
                self._selector.unregister(line.connection)
                line.connection.close()
                del self._lines[rank]
                if not line.left:
                    self._lost[rank] = time.monotonic()
            elif not line.deaf:
                news += [(rank, message) for message in self._read(rank, line, received)]
        return news

    def lost(self) -> dict[int, float]:
        """Ranks whose connection ended without a goodbye, and how many seconds ago `listen` noticed.

        Rank 0 sees every other rank, and they see rank 0.
        """
        now = time.monotonic()
        return {rank: now - since for rank, since in self._lost.items()}

    def close(self, *, goodbye: bool) -> None:
        """End the connections; without a `goodbye` the others take this rank for lost."""
        if goodbye:
            self.tell(Message(Kind.GOODBYE))
        self.listen()  # what is left unread may cost the other side what was sent last
        for line in self._lines.values():
            line.connection.close()
        self._lines.clear()
        self._selector.close()

    def _read(self, rank: int, line: _Line, received: bytes) -> list[Message]:
        news = []
        try:
            for message in line.channel.open(received):
                if message.kind is Kind.BEAT:
                    self.heard[rank] = (message, time.monotonic())
                elif message.kind is Kind.GOODBYE:
                    line.left = True
                else:
                    news.append(message)
        except BadMessage:
            line.deaf = True
        return news

    def _send(self, line: _Line) -> None:
        # What has failed here shows when the connection is read.
        with contextlib.suppress(OSError):
            while line.unsent:
                line.unsent = line.unsent[line.connection.send(line.unsent) :]

    def _hold(self, rank: int, connection: socket.socket, channel: Channel) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _LIVENESS:
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._lines[rank] = _Line(connection, channel)
        self._selector.register(connection, selectors.EVENT_READ, rank)

    def _connect(self, address: str, port: int, secret: bytes) -> str | None:
        """Come into contact with rank 0; what went wrong."""
        try:
            connection = socket.create_connection((address, port), timeout=_CONNECT_SECONDS)
            channel = Channel(secret, self._ranks.rank, 0, self._ranks.world_size)
            connection.sendall(channel.seal(Message(Kind.BEAT, 0, 0, "start")))
            self._hold(0, connection, channel)
        except OSError as error:
            return (
                f"rank {self._ranks.rank} on {socket.gethostname()} cannot reach rank 0 at {address}:{port} ({error}); "
                f"{_OPEN}"
            )
        return None

    def _admit(self, listener: socket.socket, secret: bytes) -> str | None:
        """Hold the connections of all other ranks; what went wrong."""
        world_size = self._ranks.world_size
        with _Door(listener, secret, world_size) as door:
            try:
                admitted = door.admit(_MEET_SECONDS)
            except OSError as error:
                held = f"{world_size - 1} connections ({error.strerror})"
                return f"rank 0 cannot hold {held}; raise its limit of open files (ulimit -n)."
        for rank, (connection, channel) in admitted.items():
            self._hold(rank, connection, channel)
        missing = [str(rank) for rank in range(1, world_size) if rank not in admitted]
        if not missing:
            return None
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        return f"rank 0 has not heard from rank {', '.join(missing[:8])}{more} in {_MEET_SECONDS:.0f} s; {_OPEN}"


class _Door:
    """Where rank 0 awaits the others' first messages. Afterwards nothing listens there any more."""

    def __init__(self, listener: socket.socket, secret: bytes, world_size: int) -> None:
        self._listener, self._secret, self._world_size = listener, secret, world_size
        self._strangers: dict[socket.socket, Channel] = {}
        self._admitted: dict[int, tuple[socket.socket, Channel]] = {}
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> _Door:
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        return self

    def __exit__(self, *_: object) -> None:
        for stranger in list(self._strangers):
            self._turn_away(stranger)
        self._selector.close()
        self._listener.close()

    def admit(self, seconds: float) -> dict[int, tuple[socket.socket, Channel]]:
        """The ranks' connections: of all, or of those that have come within the time.

        Raises:
            OSError: this process may not hold so many.
        """
        deadline = time.monotonic() + seconds
        while len(self._admitted) < self._world_size - 1 and (left := deadline - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj in self._strangers:
                    self._hear(key.fileobj)
        return self._admitted

    def _accept(self) -> None:
        try:
            stranger = self._listener.accept()[0]
        except (BlockingIOError, ConnectionError):  # gone again
            return
        stranger.setblocking(False)
        self._strangers[stranger] = Channel(self._secret, 0, None, self._world_size)
        self._selector.register(stranger, selectors.EVENT_READ)
        if len(self._strangers) > _STRANGERS + self._world_size:
            self._turn_away(next(iter(self._strangers)))

    def _hear(self, stranger: socket.socket) -> None:
        channel = self._strangers[stranger]
        try:
            received = stranger.recv(1 << 12)
            first = next(channel.open(received), None)
        except BlockingIOError:
            return
        except (OSError, BadMessage):
            self._turn_away(stranger)
            return
        if first is not None and channel.theirs is not None and channel.theirs not in self._admitted:
            self._selector.unregister(stranger)
            del self._strangers[stranger]
            self._admitted[channel.theirs] = (stranger, channel)
        elif first is not None or not received:
            self._turn_away(stranger)

    def _turn_away(self, stranger: socket.socket) -> None:
        self._selector.unregister(stranger)
        del self._strangers[stranger]
        stranger.close()


def _network() -> tuple[str, ...]:
    """What is the same for ranks that reach one another by the loopback address: kernel, network namespace, host."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
        parts.append(os.readlink("/proc/self/ns/net"))
    return tuple(parts)


def _addresses(name: str) -> list[str]:
    """The addresses that a host's name stands for on this host; none where it is not known here."""
    try:
        return sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})
    except (OSError, ValueError):
        return []


def _listen_to(places: list[Any], ranks: Ranks) -> tuple[socket.socket, str]:
    """A socket that listens where the other ranks reach this host and nowhere else; and the address they use.

    The name of this host often stands for another address on itself than elsewhere, so those on other hosts say for
    which. Where none of theirs belongs to this host (it is translated on the way), all interfaces are listened to.
    """
    backlog = ranks.world_size + _STRANGERS
    others = [set(addresses) for _, network, addresses in places if network != places[0][1]]
    for address in sorted(set.intersection(*others)) if others else [LOOPBACK]:
        with contextlib.suppress(OSError):
            return listen(address, 0, backlog), address
    return listen(None, 0, backlog), ranks.master_address
